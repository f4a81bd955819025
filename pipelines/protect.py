"""``scol protect``: the driver. Checks, lists, plans, runs the stages, and writes what the run leaves behind."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, TextIO

import fsspec
import pyarrow as pa

from cluster import Engine, Pool, Progress, Resources, RunInterrupted, RunSummary, hash_key
from pipelines import gallery_jobs, models, nightly, retry
from pipelines.config import STAGES, Config
from pipelines.machine import machine
from pipelines.manifests import ERROR, OK, PLAN_SCHEMA, SOURCE, SOURCE_SCHEMA, Run, duration, summary, utc
from pipelines.logs import JsonLog
from pipelines.observe import Observer
from pipelines.presence import Presence
from pipelines.sources import OutputError, SourceError, SourceRow, check_out, content_digest, list_photos
from pipelines.stages import VERSIONS, make_stages


class ProtectError(ValueError):
    """Something about a run as a whole. `str()` is `CODE: words`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


# ---- the source ------------------------------------------------------------------------------------------------------


@dataclass
class Listing:
    """What SRC holds: photos (with those that cannot be used, `error` set), and what was skipped, by code.

    `everything`: also the photos that ``--limit`` leaves out.
    """

    photos: list[SourceRow]
    skipped: dict[str, int] = field(default_factory=dict)
    everything: list[SourceRow] = field(default_factory=list)

    @property
    def total(self) -> int:
        return len(self.everything)


def list_source(
    src: str,
    *,
    out: str | None = None,
    people_from: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    verify_content: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Listing:
    """List SRC; with ``limit`` a random sample of so many photos, the same for the same seed, in order of paths.

    Args:
        verify_content: read every photo of the sample and set its row's `content`.
        stop: asked now and then; where it says true, the listing ends as by Ctrl-C (KeyboardInterrupt).

    Raises:
        SourceError: see ``sources.list_photos``.
        ProtectError: EMPTY, no photo there.
    """
    photos, skipped = [], Counter()
    for row in list_photos(src, people_from=people_from, out=out):
        if stop():
            raise KeyboardInterrupt
        if row.skipped:
            skipped[row.code] += 1
        else:
            photos.append(row)
    if not photos:
        raise ProtectError(
            "EMPTY", f"no photo at {src}" + (f" ({sum(skipped.values())} other files)" if skipped else "")
        )
    everything = photos
    if limit is not None and limit < len(photos):
        photos = sorted(random.Random(seed).sample(photos, limit), key=lambda row: row.path)
    if verify_content:
        photos = with_content(photos, stop)
    return Listing(photos, dict(skipped), everything)


def with_content(photos: Sequence[SourceRow], stop: Callable[[], bool], readers: int = 16) -> list[SourceRow]:
    """The rows with `content` set; a photo that cannot be read gets `error`. Every file is read once."""

    def hashed(row: SourceRow) -> SourceRow:
        if row.error is not None:
            return row
        try:
            return replace(row, content=content_digest(row.url))
        except SourceError as error:
            return replace(row, error=str(error))

    out: list[SourceRow] = []
    with ThreadPoolExecutor(readers) as pool:
        for first in range(0, len(photos), 256):  # `map` would queue all of them at once
            if stop():
                raise KeyboardInterrupt
            out.extend(pool.map(hashed, photos[first : first + 256]))
    return out


def source_key(row: SourceRow) -> str:
    """Key of a photo at the source: where it is, and which version of it.

    The version is the content where it is known, else size and modification time (or etag).
    """
    version = (row.size, row.modified) if row.content is None else ("content", row.content)
    fields = (row.path, row.url, *version, row.person_id, row.error)
    return hash_key(SOURCE, *("" if value is None else value for value in fields))


def source_table(photos: Sequence[SourceRow]) -> pa.Table:
    """Rows of the source table (``manifests.SOURCE_SCHEMA``)."""
    return pa.Table.from_pylist(
        [
            {
                "key": source_key(row),
                "photo_id": row.photo_id,
                "path": row.path,
                "url": row.url,
                "size": row.size,
                "modified": row.modified,
                "content": row.content,
                "person_id": row.person_id,
                "status": ERROR if row.error else OK,
                "reason": row.error,
            }
            for row in photos
        ],
        SOURCE_SCHEMA,
    )


# ---- keys ------------------------------------------------------------------------------------------------------------


def stage_keys(
    source: pa.Table,
    config: Config,
    weights: dict[str, str],
    out: str = "",
    opened: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> dict[str, list[str]]:
    """The photos' keys at every stage, all known before anything runs (docs/design.md).

    Args:
        opened: of ``retry.opened``.
    """
    keys, before = {}, source["key"].to_pylist()
    for stage in STAGES:
        # What is the same for all photos is hashed once.
        common = hash_key(
            stage, VERSIONS[stage], config.canonical(stage), weights[stage], out if stage == "publish" else ""
        )
        before = keys[stage] = [hash_key(common, key) for key in before]
        if opened.get(stage):
            before = keys[stage] = [retry.current(key, opened[stage]) for key in before]
    return keys


def _output_sizes(out: str, paths: Sequence[str]) -> list[int | None]:
    """Sizes in bytes of files in OUT; None where there is none."""
    fs, root = fsspec.core.url_to_fs(out)
    if isinstance(fs.protocol, tuple | str) and "file" in fs.protocol:

        def size(path: str) -> int | None:
            try:
                return os.stat(os.path.join(root, path)).st_size
            except OSError:
                return None

        return [size(path) for path in paths]
    fs.invalidate_cache()
    root = root.rstrip("/")
    try:
        found = {name[len(root) + 1 :]: info["size"] for name, info in fs.find(root, detail=True).items()}
    except FileNotFoundError:
        found = {}
    return [found.get(path) for path in paths]


def renew_missing(
    run: Run, out: str, source: pa.Table, keys: list[str], opened: Collection[str] = ()
) -> list[str]:
    """Publish keys such that a photo whose file in OUT is gone, or has another size than was written, is done again.

    Parts are never changed, so such a photo gets a new key: that of the next attempt. So does one whose latest attempt
    is in ``opened`` (``retry.opened``).
    """
    store = run.store
    done = store.done_keys("publish")
    if not done:
        return keys
    attempts: list[list[str]] = []
    for key in keys:
        chain = [key]
        while chain[-1] in done:
            chain.append(retry.again(chain[-1]))
        attempts.append(chain)
    latest = [chain[-2] for chain in attempts if len(chain) > 1]
    if not latest:
        return keys
    written: dict[str, int | None] = {}
    for table in store.scan("publish", latest, ["key", "action", "out_bytes"]):
        for row in table.to_pylist():
            if row["action"] in ("protected", "copied"):
                written[row["key"]] = row["out_bytes"]
    sizes = _output_sizes(out, source["path"].to_pylist())
    return [
        chain[0]
        if len(chain) == 1
        else chain[-2]
        if chain[-2] not in opened and (chain[-2] not in written or written[chain[-2]] == size)
        else chain[-1]
        for chain, size in zip(attempts, sizes, strict=True)
    ]


# ---- running ---------------------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """What the stages of a run were given."""

    weights: dict[str, str]
    gallery_url: str
    gallery: dict[str, Any]


def execute(
    run: Run,
    source: pa.Table,
    config: Config,
    *,
    about: Mapping[str, str] | None = None,
    out: str | None = None,
    until: str = "publish",
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    say: Callable[[str], None] = lambda text: None,
    on_start: Callable[[Setting], None] | None = None,
) -> tuple[RunSummary, Setting]:
    """Plan and run the stages up to ``until`` over these photos; what is done already is not done again.

    Args:
        source: of ``source_table``.
        about: kept with the plan, see ``manifests.plan_about``.
        stop: see ``Engine``.

    Raises:
        WeightsError: embedded weights are missing or altered.
        GalleryError, StoreError, EngineError: see their packages.
        RunInterrupted: Ctrl-C; what is finished is kept.
    """
    url, described, std = "", {}, None
    if STAGES.index(until) >= STAGES.index("fuse"):
        url, info = gallery_jobs.ensure_gallery(config, run, say)
        described = gallery_jobs.described_for_run(url, info)
        if config.attack.enabled and config.inspect.unit == "std":
            std = gallery_jobs.gallery_std(run, url, info)
    std_digest = "" if std is None else hashlib.sha256(std.tobytes()).hexdigest()[:16]
    way = gallery_jobs.compressed_info(info) if described and config.gallery.search == "compressed" else ""
    weights = models.stage_weights(config, described.get("fingerprint", "") + way, std_digest)
    opened = retry.opened(run)
    keys = stage_keys(source, config, weights, out or "", opened)
    if until == "publish":
        keys["publish"] = renew_missing(run, out, source, keys["publish"], opened.get("publish", ()))
    # Stages beyond `until` get their keys in the plan as well: they are what a later run would make.
    run.write_plan(
        pa.table([source["photo_id"], source["path"], source["key"], *(keys[s] for s in STAGES)], PLAN_SCHEMA), about
    )
    setting = Setting(weights, url, described)
    if on_start is not None:
        on_start(setting)
    stages = make_stages(config, weights, gallery=url, std=std, out=out, photos=source.num_rows, until=until)
    engine = Engine(
        run.store,
        stages,
        pools=partial(layout, config),
        source=SOURCE,
        shard_items=config.engine.shard_photos,
        address=config.engine.ray_address,
        progress=progress,
        stop=stop,
    )
    with gallery_jobs.reading(url):
        return engine.run(source, keys), setting


# A generator, an encoder and two recognisers with their gradients: 1.5 GB at 256 px, more at 1024 px.
_WORKER_BYTES = {256: 2 * 2**30, 1024: 6 * 2**30}


def layout(config: Config, nodes: Sequence[dict[str, float]]) -> dict[str, Pool]:
    """Pools for a cluster. Nearly all work is tuning, so the generators get the machines: one a GPU, or as many
    single-threaded ones as there are cores and memory for. The other pools are small and reserve nothing.

    Args:
        nodes: Ray resources of each live node: "CPU", "GPU", "memory" (bytes).
    """
    settings = config.engine
    cpus = max(1, int(sum(node.get("CPU", 0) for node in nodes)))
    gpus = 0 if settings.device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
    memory = sum(node.get("memory", 0) for node in nodes)
    if gpus:
        actors = settings.workers or gpus
        threads = settings.threads or max(1, min(4, cpus // actors))
    else:
        fitting = max(1, int(memory // _WORKER_BYTES[config.crop_size])) if memory else cpus
        actors = settings.workers or min(cpus, fitting)
        threads = settings.threads or max(1, min(8, cpus // actors))
    generator = Resources(num_cpus=min(threads, cpus / actors), num_gpus=min(1.0, gpus / actors), threads=threads)
    small = Resources(num_cpus=0.0, threads=1)
    return {
        "generator": Pool(actors=actors, resources=generator),
        "gallery": Pool(actors=1, resources=Resources(num_cpus=0.0, threads=max(1, min(4, cpus // 2)))),
        "photos": Pool(actors=math.ceil(actors / 4), resources=small),
    }


class Reporter:
    """Progress for people: one line that is rewritten on a terminal, a plain line now and then in a log.

    Args:
        stream: where to.
        every: seconds between lines in a log.
    """

    def __init__(self, stream: TextIO = sys.stderr, every: float = 15.0) -> None:
        self.stream, self.every = stream, every
        self.live = stream.isatty()
        self.begin = time.monotonic()
        self.last = 0.0
        self.kept: dict[str, int] = {}
        self.stages: dict[str, Progress] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.stage == SOURCE:
            return
        if progress.stage not in self.stages:  # said of every stage at the start: what an earlier run has done
            self.kept[progress.stage] = progress.done
            self.stages[progress.stage] = progress
            return
        self.stages[progress.stage] = progress
        now = time.monotonic()
        finished = progress.stage == list(self.stages)[-1] and progress.done == progress.total
        if not finished and now - self.last < (0.2 if self.live else self.every):
            return
        self.last = now
        line = self.line(now)
        if self.live:
            self.stream.write("\r\x1b[2K" + line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def line(self, now: float) -> str:
        """The state in one line: photos through the last stage, rate, time left, and the stage that works."""
        seconds = max(1e-9, now - self.begin)
        last = list(self.stages)[-1]
        done = self.stages[last].done
        new = done - self.kept[last]
        text = f"{done}/{self.stages[last].total} photos"
        if new > 0:
            rate = new / seconds
            text += f", {60 * rate:.1f} photos/min, {duration((self.stages[last].total - done) / rate)} left"
        else:
            text += f", {duration(seconds)} so far"
        text += "".join(
            f", {p.stage} {p.done}" for p in self.stages.values() if p.stage != last and done <= p.done < p.total
        )
        failed = self.stages[last].statuses.get(ERROR, 0)
        return text + (f", {failed} failed" if failed else "")

    def close(self) -> None:
        if self.live and self.stages:
            self.stream.write("\n")
            self.stream.flush()


# ---- what a run leaves behind ----------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that results depend on."""
    names = (
        "scol",
        "torch",
        "torchvision",
        "numpy",
        "pyarrow",
        "pillow",
        "ray",
        "faiss-gpu",
        "faiss-cpu",
        "scikit-image",
        "flip-evaluator",
        "facenet-pytorch",
        "random-face",
    )
    found = {name: _version(name) for name in names}
    return {"python": platform.python_version(), **{k: v for k, v in found.items() if v is not None}}


def default_run(out: str) -> str:
    """The run's folder, beside OUT."""
    return out.rstrip("/") + ".run"


def check_places(src: str, out: str, run_url: str) -> None:
    """OUT and RUN are apart from SRC and from each other, and can be written to.

    Raises:
        OutputError, SourceError: see ``sources.check_out``.
    """
    check_out(src, out)
    try:
        check_out(src, run_url)
    except OutputError as error:
        raise OutputError(error.code, f"the run's folder: {error.message}") from error
    places = [fsspec.core.url_to_fs(url)[0].unstrip_protocol(fsspec.core.url_to_fs(url)[1]) for url in (out, run_url)]
    if places[1].rstrip("/") == places[0].rstrip("/") or places[1].startswith(places[0].rstrip("/") + "/"):
        raise OutputError(
            "OUT_IS_SRC", "the run's folder must not be OUT nor lie in it: OUT gets the photos' tree alone"
        )


def protect(
    src: str,
    out: str,
    config: Config,
    *,
    run_url: str | None = None,
    people_from: str | None = None,
    limit: int | None = None,
    sample_seed: int = 0,
    verify_content: bool = False,
    prune: bool = False,
    log_json: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress_stream: TextIO | None = None,
) -> dict[str, Any]:
    """Protect the photos of SRC into OUT.

    Args:
        src, out: a path or an fsspec URL; see ``sources``.
        config: of the run.
        run_url: the run's folder; by default beside OUT.
        people_from: ``folder``: a photo's folder names its person.
        limit, sample_seed: only a random sample of so many photos.
        verify_content: a photo has changed where its bytes have, whatever its size and modification time say; reads
            every photo.
        prune: once the stages are through, remove the outputs of photos that SRC no longer has (``nightly.prune``).
        log_json: file that structured logs are appended to (``logs``).
        say: takes messages for people, one line each.
        progress_stream: where progress goes; None for nowhere.

    Returns:
        the content of ``RUN/summary.json``.

    Raises:
        SourceError, OutputError, ProtectError: SRC, OUT or RUN cannot be used.
        WeightsError, GalleryError, ClusterError: see their packages.
        BusyError: a purge of the run is going on.
        RunInterrupted: Ctrl-C or ``scol cancel``; the tables, the report and the summary of what is finished are
            written before.
    """
    run = Run(absolute(run_url or default_run(out)))
    check_places(src, out, run.url)
    observer = Observer(run)
    begin = time.monotonic()
    with ExitStack() as stack:
        presence = Presence(run, "protect", observer.tell, observer.work)
        if log_json is not None:
            log = observer.log = stack.enter_context(JsonLog(log_json, presence.id))
            where = {"run": run.url, "source": absolute(src), "out": absolute(out)}
            log.event("start", **where)
            # called after the presence has ended, which knows how
            stack.callback(
                lambda: log.event("end", **where, state=presence.state, seconds=round(time.monotonic() - begin, 3))
            )
        stack.enter_context(presence)
        return _protect(
            run,
            src,
            absolute(out),
            config,
            presence,
            observer,
            people_from=people_from,
            limit=limit,
            sample_seed=sample_seed,
            verify_content=verify_content,
            prune=prune,
            say=say,
            progress_stream=progress_stream,
        )


def _protect(
    run: Run,
    src: str,
    out: str,
    config: Config,
    presence: Presence,
    observer: Observer,
    *,
    people_from: str | None,
    limit: int | None,
    sample_seed: int,
    verify_content: bool,
    prune: bool,
    say: Callable[[str], None],
    progress_stream: TextIO | None,
) -> dict[str, Any]:
    begin = time.monotonic()
    listing = list_source(
        src,
        out=out,
        people_from=people_from,
        limit=limit,
        seed=sample_seed,
        verify_content=verify_content,
        stop=presence.stopped,
    )
    some = f", of {listing.total}" if len(listing.photos) < listing.total else ""
    say(f"{len(listing.photos)} photos at {src}{some}" + _skipped_words(listing.skipped))
    source = source_table(listing.photos)
    observer.photos = source["photo_id"]
    about = {"source": absolute(src), "evidence": "content" if verify_content else "stat"}
    listed = source["photo_id"].combine_chunks()
    if len(listing.photos) < listing.total:
        listed = pa.array([row.photo_id for row in listing.everything], pa.string())
    failed = [row.path for row in listing.everything if row.error is not None]
    changes = nightly.compare(run, about["source"], source, listed, failed, about["evidence"])
    if changes.compared:
        say(changes.words())
    if changes.evidence_changed:
        say("the last run told versions of photos otherwise (--verify-content), so all photos are done anew")
    for path in changes.deleted[:20]:
        say(f"deleted: {path}")
    record: dict[str, Any] = {
        "version": 1,
        "started": utc(),
        "finished": None,
        "source": about["source"],
        "out": out,
        "run": run.url,
        "limit": limit,
        "sample_seed": sample_seed if limit is not None else None,
        "people_from": people_from,
        "verify_content": verify_content,
        "prune": prune,
        "skipped": listing.skipped,
        "config": config.model_dump(mode="json"),
        "stage_versions": VERSIONS,
        "versions": versions(),
        "machine": machine(),
    }

    def started(setting: Setting) -> None:
        record["weights"], record["gallery"] = setting.weights, setting.gallery
        run.write_json("run.json", record)

    reporter = None if progress_stream is None else Reporter(progress_stream)

    def progress(message: Progress) -> None:
        observer(message)
        if reporter is not None:
            reporter(message)

    interrupted: RunInterrupted | None = None
    done: RunSummary | None = None
    try:
        done, _ = execute(
            run,
            source,
            config,
            about=about,
            out=out,
            progress=progress,
            stop=presence.stopped,
            say=say,
            on_start=started,
        )
    except RunInterrupted as error:
        interrupted, done = error, error.summary
    finally:
        if reporter is not None:
            reporter.close()
    result = summary(run)
    result["skipped"] = listing.skipped
    result["changes"] = changes.to_dict()
    if prune and interrupted is None:
        live = pa.chunked_array([pa.array([row.path for row in listing.everything], pa.string())])
        pruned = nightly.prune(run, about["source"], out, live)
        result["changes"]["pruned"] = pruned.to_dict()
        say(f"pruned: {len(pruned.removed)} output(s) removed")
        for path, why in pruned.kept.items():
            say(f"not pruned: {path}: {why}")
    elif changes.waiting:
        say(f"{len(changes.waiting)} deleted photo(s) still have their outputs; --prune removes them")
    result["seconds"] = round(time.monotonic() - begin, 3)
    worked = sum(stage.operator_seconds for stage in done.stages.values())
    result["engine"] = done.to_dict()
    result["seconds_per_face"] = (
        round(sum(result["stage_seconds"].values()) / result["faces"], 3) if result["faces"] else None
    )
    result["operator_seconds"] = round(worked, 3)
    result["interrupted"] = interrupted is not None
    record["finished"] = utc()
    run.write_json("run.json", record)
    run.write_json("summary.json", result)
    _write_report(run, say)
    if interrupted is not None:
        if presence.stopped():
            say("stopped, because `scol cancel` asked for it")
        raise interrupted
    return result


def absolute(url: str) -> str:
    """A local path made absolute, since workers may have another working directory; other URLs as they are."""
    fs, path = fsspec.core.url_to_fs(url)
    local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
    return path if local else url


def _write_report(run: Run, say: Callable[[str], None]) -> None:
    from pipelines.report import write_report

    try:
        write_report(run.url)
    except Exception as error:  # the photos are done: a report that fails must not look like a run that failed
        say(f"the report could not be written: {type(error).__name__}: {error}")


def _skipped_words(skipped: dict[str, int]) -> str:
    words = {"NOT_A_PHOTO": "other files", "HIDDEN": "hidden files or folders"}
    return "".join(f"; {count} {words.get(code, code)} left alone" for code, count in sorted(skipped.items()))


def table_of(result: dict[str, Any]) -> str:
    """The final table of a run."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        ("photos", str(result["photos"])),
        ("faces", str(result["faces"])),
        ("photos protected", str(result["published"])),
        ("  of them weak", str(result["weak"])),
        ("without a face (copied)", str(result["no_face"])),
        ("failed", str(result["error"])),
        ("PSNR of the face crop, dB", number(result["psnr"], ".2f")),
        ("SSIM of the face crop", number(result["ssim"], ".3f")),
        (f"ISM by {result['judge'] or 'the judge'}", number(result["ism"], ".3f")),
        ("seconds a face (all stages)", number(result.get("seconds_per_face"), ".1f")),
        ("seconds in all", number(result.get("seconds"), ".1f")),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value:>10}" for name, value in rows)


def exit_status(result: dict[str, Any]) -> int:
    """0 where nothing failed (weak photos are warned of, not failures), 1 where a photo failed or is still to do."""
    return 1 if result["error"] or result["pending"] else 0
