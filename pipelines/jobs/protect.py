"""``scol protect``: the driver. Checks, lists, plans, runs the stages, and writes what the run leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TextIO

from cluster import Progress, RunInterrupted, RunSummary
from cluster.digest import read_digest
from pipelines.archive.listing import list_source
from pipelines.archive.output import check_places
from pipelines.archive.paths import absolute
from pipelines.config.names import STAGES, VERSIONS
from pipelines.config.sections import Config
from pipelines.jobs import changes as night_changes
from pipelines.jobs import prune as pruning
from pipelines.jobs.chain import Setting, execute
from pipelines.jobs.progress import Reporter
from pipelines.networks import resolve as resolving
from pipelines.report.run_page import write_report
from pipelines.run.environment import machine, versions
from pipelines.run.folder import Run, default_run
from pipelines.run.logs import JsonLog
from pipelines.run.observe import Observer
from pipelines.run.presence import Presence
from pipelines.run.schemas import LIGHT
from pipelines.run.summary import summary
from pipelines.run.text import utc


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
        prune: once the stages are through, remove the outputs of photos that SRC no longer has (``jobs.prune.prune``).
        log_json: file that structured logs are appended to (``logs``).
        say: takes messages for people, one line each.
        progress_stream: where progress goes; None for nowhere.

    Returns:
        the content of ``RUN/summary.json``.

    Raises:
        SourceError, OutputError, ProtectError: SRC, OUT or RUN cannot be used.
        WeightsError, GalleryError, ClusterError: see their packages.
        BusyError: somebody else is at work on the run.
        RunInterrupted: Ctrl-C or ``scol cancel``; the tables, the report and the summary of what is finished are
            written before.
    """
    config = resolving.resolve(config, say)  # a model that is missing is told before anything is made
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
    changes = night_changes.compare(run, about["source"], listing, listing.all_ids, listing.failed, about["evidence"])
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
        pruned = pruning.prune(run, about["source"], out, listing.all_paths())
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
            say(f"stopped, because {presence.why}")
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


def _write_report(run: Run, say: Callable[[str], None]) -> None:

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
