"""``scol protect``: the driver. Checks, lists, plans, runs the stages, and writes what the run leaves behind."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO

import fsspec
import pyarrow as pa

from cluster import Engine, KeyRule, Pool, Progress, Resources, RunInterrupted, RunSummary
from cluster.digest import read_digest
from pipelines import gallery_jobs, models, nightly, retry
from pipelines.config import STAGES, VERSIONS, Config
from pipelines.keys import chain, derive, renewal, stage_rules
from pipelines.listing import Listing, ProtectError, list_source, source_table
from pipelines.machine import machine
from pipelines.manifests import ERROR, LIGHT, PLAN_SCHEMA, SOURCE, Run, duration, summary, utc
from pipelines.logs import JsonLog
from pipelines.observe import Observer
from pipelines.presence import Presence
from pipelines.sources import OutputError, check_out
from pipelines.stages import make_stages

__all__ = ["ProtectError", "execute", "list_source", "protect", "source_table"]


# ---- running ---------------------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """What the stages of a run were given."""

    weights: dict[str, str]
    gallery_url: str
    gallery: dict[str, Any]


def execute(
    run: Run,
    source: pa.Table | Listing,
    config: Config,
    *,
    about: Mapping[str, str] | None = None,
    out: str | None = None,
    verify: bool = False,
    until: str = "publish",
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    say: Callable[[str], None] = lambda text: None,
    on_start: Callable[[Setting], None] | None = None,
) -> tuple[RunSummary, Setting]:
    """Plan and run the stages up to ``until`` over these photos; what is done already is not done again.

    Args:
        source: of ``source_table``, or a listing of any length.
        about: kept with the plan, see ``manifests.plan_about``.
        verify: read what is in OUT, and publish again what has other bytes than were written.
        stop: see ``Engine``.

    Raises:
        WeightsError: embedded weights are missing or altered.
        GalleryError, StoreError, EngineError: see their packages.
        RunInterrupted: Ctrl-C; what is finished is kept.
    """
    url, described, std = "", {}, None
    if STAGES.index(until) >= STAGES.index("fuse"):
        heard = stop or (lambda: False)
        url, info = gallery_jobs.patiently(lambda: gallery_jobs.ensure_gallery(config, run, say, heard))
        described = gallery_jobs.described_for_run(url, info)
        if config.attack.enabled and config.inspect.unit == "std":
            std = gallery_jobs.gallery_std(run, url, info, config.num_codes)
    std_digest = "" if std is None else hashlib.sha256(std.tobytes()).hexdigest()[:16]
    way = gallery_jobs.compressed_info(info) if described and config.gallery.search == "compressed" else ""
    weights = models.stage_weights(config, described.get("fingerprint", "") + way, std_digest)
    opened = retry.opened(run)
    rules = stage_rules(config, weights, out or "", opened)
    if until == "publish":
        rules["publish"] = chain(rules["publish"], renewal(run, out, opened.get("publish", ()), verify))
    tables = [source] if isinstance(source, pa.Table) else source
    # Stages beyond `until` get their keys in the plan as well: they are what a later run would make.
    run.write_plan((planned(table, rules) for table in tables), about)
    setting = Setting(weights, url, described)
    if on_start is not None:
        on_start(setting)
    stages = make_stages(config, weights, gallery=url, std=std, out=out, photos=len(source), until=until)
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
        return engine.run(source, rules), setting


def planned(table: pa.Table, rules: Mapping[str, KeyRule]) -> pa.Table:
    """Rows of the plan, of photos of the source table."""
    keys = derive(rules, table["key"].to_pylist())
    return pa.table([table["photo_id"], table["path"], table["key"], *keys.values()], PLAN_SCHEMA)


# A generator, an encoder and two recognisers with their gradients: 1.5 GB at 256 px, more at 1024 px.
def _worker_bytes(size: int) -> int:
    return 2 * 2**30 if size <= 256 else 6 * 2**30


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
        fitting = max(1, int(memory // _worker_bytes(config.crop_size))) if memory else cpus
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
        "lpips",
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
        verify_content: a photo, or a file in OUT, has changed where its bytes have, whatever its size and modification
            time say; reads all of them.
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
    config = models.resolve(config, say)  # a model that is missing is told before anything is made
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
    some = f", of {listing.total}" if len(listing) < listing.total else ""
    say(f"{len(listing)} photos at {src}{some}" + _skipped_words(listing.skipped))
    observer.photos = listing.ids
    about = {"source": absolute(src), "evidence": "content" if verify_content else "stat"}
    changes = nightly.compare(run, about["source"], listing, listing.all_ids, listing.failed, about["evidence"])
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
            listing,
            config,
            about=about,
            out=out,
            verify=verify_content,
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
    result, same = _totals(run, done)
    result["skipped"] = listing.skipped
    result["changes"] = changes.to_dict()
    if prune and interrupted is None:
        pruned = nightly.prune(run, about["source"], out, listing.all_paths())
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
    if not same:
        _write_report(run, say)
    if interrupted is not None:
        if presence.stopped():
            say("stopped, because `scol cancel` asked for it")
        raise interrupted
    return result


def _totals(run: Run, done: RunSummary) -> tuple[dict[str, Any], bool]:
    """The run's totals, and whether they, and so the report, are still those of the last run: the same photos with the
    same keys, and nothing that this run did."""
    plan = run.sha256("plan.parquet")
    if run.has("summary.json") and run.has("report.html") and not any(s.done for s in done.stages.values()):
        before = run.read_json("summary.json")
        if before.get("plan") == plan and not before["interrupted"]:
            return before, True
    for stage in STAGES:
        read_digest(run.store, stage, ["key"], LIGHT[stage], save=True)
    return summary(run) | {"plan": plan}, False


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

    again = result["strengthened"]
    rows = [
        ("photos", str(result["photos"])),
        ("faces", str(result["faces"])),
        ("photos protected", str(result["published"])),
        ("  of them weak", str(result["weak"])),
        ("faces weak, %", number(None if result["weak_share"] is None else 100 * result["weak_share"], ".1f")),
        *([("faces strengthened", str(again["faces"])), ("  in rounds", str(again["rounds"]))] if again else []),
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
