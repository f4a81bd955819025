"""``scol protect``: the driver. Checks, lists, plans, runs the stages, and writes what the run leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TextIO

from cluster import Progress, RunInterrupted, RunSummary
from cluster.digest import read_digest
from pipelines.archive.listing import Listing, list_source
from pipelines.archive.output import check_places
from pipelines.archive.paths import absolute
from pipelines.config.names import STAGES, VERSIONS
from pipelines.config.sections import Config
from pipelines.jobs.chain import execute
from pipelines.jobs.changes import Changes, compare
from pipelines.jobs.progress import Reporter
from pipelines.jobs.prune import prune as remove_outputs
from pipelines.jobs.run_gallery import RunGallery
from pipelines.networks.resolve import resolve
from pipelines.report.run_page import write_report
from pipelines.run.environment import machine, versions
from pipelines.run.folder import Run, default_run
from pipelines.run.logs import JsonLog
from pipelines.run.observe import Observer
from pipelines.run.presence import Presence
from pipelines.run.schemas import LIGHT
from pipelines.run.summary import MEASURES, summary
from pipelines.run.text import utc
from pipelines.run.text_tables import aligned, number
from pipelines.stages.declaration import Setting


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
    config = resolve(config, say)  # a model that is missing is told before anything is made
    begin = time.monotonic()
    run = Run(absolute(run_url or default_run(out)))
    check_places(src, out, run.url)
    observer = Observer(run)
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
        wish = _Wish(src, absolute(out), people_from, limit, sample_seed, verify_content, prune)
        return _Job(run, wish, config, presence, observer, say).work(begin, progress_stream)


@dataclass(frozen=True)
class _Wish:
    """What was asked for, besides the configuration; names as of ``protect``."""

    src: str
    out: str
    people_from: str | None
    limit: int | None
    sample_seed: int
    verify_content: bool
    prune: bool


class _Job:
    """The phases of one ``scol protect``: list, compare, record, run the stages, prune, add up, report."""

    def __init__(
        self,
        run: Run,
        wish: _Wish,
        config: Config,
        presence: Presence,
        observer: Observer,
        say: Callable[[str], None],
    ) -> None:
        self.run, self.wish, self.config = run, wish, config
        self.presence, self.observer, self.say = presence, observer, say
        self.source = absolute(wish.src)

    def work(self, begin: float, progress_stream: TextIO | None) -> dict[str, Any]:
        """All of it; the summary. Arguments: seconds on the monotonic clock, and as of ``protect``."""
        listing = self._list()
        changes = self._compare(listing)
        record = self._record(listing)
        done, interrupted = self._run_stages(listing, record, progress_stream)
        result, same = _totals(self.run, done)
        result |= {"skipped": listing.skipped, "changes": changes.to_dict()}
        if self.wish.prune and interrupted is None:
            result["changes"]["pruned"] = self._prune(listing)
        elif changes.waiting:
            self.say(f"{len(changes.waiting)} deleted photo(s) still have their outputs; --prune removes them")
        result |= _effort(result, done) | {"interrupted": interrupted is not None}
        result["seconds"] = round(time.monotonic() - begin, 3)
        self.run.write_json("run.json", record | {"finished": utc()})
        self.run.write_json("summary.json", result)
        if not same:
            _write_report(self.run, self.say)
        if interrupted is not None:
            if self.presence.stopped():
                self.say(f"stopped, because {self.presence.why}")
            raise interrupted
        return result

    def _list(self) -> Listing:
        wish = self.wish
        listing = list_source(
            wish.src,
            out=wish.out,
            people_from=wish.people_from,
            limit=wish.limit,
            seed=wish.sample_seed,
            verify_content=wish.verify_content,
            stop=self.presence.stopped,
        )
        some = f", of {listing.total}" if len(listing) < listing.total else ""
        self.say(f"{len(listing)} photos at {wish.src}{some}" + _skipped_words(listing.skipped))
        self.observer.photos = listing.ids
        return listing

    @property
    def _evidence(self) -> str:
        """By what versions of photos are told apart."""
        return "content" if self.wish.verify_content else "stat"

    def _compare(self, listing: Listing) -> Changes:
        """What is new, changed and gone since the last run."""
        changes = compare(self.run, self.source, listing, listing.all_ids, listing.failed, self._evidence)
        if changes.compared:
            self.say(changes.words())
        if changes.evidence_changed:
            self.say("the last run told versions of photos otherwise (--verify-content), so all photos are done anew")
        for path in changes.deleted[:20]:
            self.say(f"deleted: {path}")
        return changes

    def _record(self, listing: Listing) -> dict[str, Any]:
        """The content of ``RUN/run.json``, without weights and gallery, which are known once the run is planned."""
        wish = self.wish
        return {
            "version": 1,
            "started": utc(),
            "finished": None,
            "source": self.source,
            "out": wish.out,
            "run": self.run.url,
            "limit": wish.limit,
            "sample_seed": wish.sample_seed if wish.limit is not None else None,
            "people_from": wish.people_from,
            "verify_content": wish.verify_content,
            "prune": wish.prune,
            "skipped": listing.skipped,
            "config": self.config.model_dump(mode="json"),
            "stage_versions": VERSIONS,
            "versions": versions(),
            "machine": machine(),
        }

    def _run_stages(
        self, listing: Listing, record: dict[str, Any], progress_stream: TextIO | None
    ) -> tuple[RunSummary, RunInterrupted | None]:
        """What the engine did, and the interruption that ended it early."""

        def started(setting: Setting, gallery: RunGallery | None) -> None:
            record["weights"], record["gallery"] = setting.weights, gallery.described() if gallery else {}
            self.run.write_json("run.json", record)

        reporter = None if progress_stream is None else Reporter(progress_stream)

        def progress(message: Progress) -> None:
            self.observer(message)
            if reporter is not None:
                reporter(message)

        try:
            done = execute(
                self.run,
                listing,
                self.config,
                about={"source": self.source, "evidence": self._evidence},
                out=self.wish.out,
                verify=self.wish.verify_content,
                progress=progress,
                stop=self.presence.stopped,
                say=self.say,
                on_start=started,
            )
            return done, None
        except RunInterrupted as error:
            return error.summary, error
        finally:
            if reporter is not None:
                reporter.close()

    def _prune(self, listing: Listing) -> dict[str, Any]:
        """Remove outputs of deleted photos; what was done."""
        pruned = remove_outputs(self.run, self.source, self.wish.out, listing.all_paths())
        self.say(f"pruned: {len(pruned.removed)} output(s) removed")
        for path, why in pruned.kept.items():
            self.say(f"not pruned: {path}: {why}")
        return pruned.to_dict()


def _effort(result: dict[str, Any], done: RunSummary) -> dict[str, Any]:
    """Columns of the summary about the work that was done."""
    spent, faces = sum(result["stage_seconds"].values()), result["faces"]
    worked = sum(stage.operator_seconds for stage in done.stages.values())
    return {
        "engine": done.to_dict(),
        "seconds_per_face": round(spent / faces, 3) if faces else None,
        "operator_seconds": round(worked, 3),
    }


def _totals(run: Run, done: RunSummary) -> tuple[dict[str, Any], bool]:
    """The run's totals, and whether they, and so the report, are still those of the last run: the same photos with the
    same keys, and nothing that this run did."""
    plan = run.sha256("plan.parquet")
    if run.has("summary.json") and run.has("report.html") and not any(s.done for s in done.stages.values()):
        before = run.read_json("summary.json")
        # One that an older version wrote may lack measures.
        if before.get("plan") == plan and not before["interrupted"] and before.keys() >= {*MEASURES}:
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
    rows = [
        ("photos", result["photos"]),
        ("faces", result["faces"]),
        ("photos protected", result["published"]),
        ("  of them weak", result["weak"]),
        ("faces weak, %", number(result["weak_share"], 1, 100)),
        *_loop_rows(result["strengthened"]),
        ("without a face (copied)", result["no_face"]),
        ("failed", result["error"]),
        ("JOD of the face (10: equal)", number(result["jod"], 2)),
        ("  5 % of the faces below", number((result["spread"]["jod"] or {}).get("p5"), 2)),
        ("PSNR of the face, dB", number(result["face_psnr"], 2)),
        ("SSIM of the face", number(result["face_ssim"], 3)),
        ("FLIP of the face", number(result["flip"], 3)),
        (f"ISM by {result['judge'] or 'the judge'}", number(result["ism"], 3)),
        ("seconds a face (all stages)", number(result.get("seconds_per_face"), 1)),
        ("seconds in all", number(result.get("seconds"), 1)),
    ]
    return aligned(rows, "<", ">10")


def _loop_rows(loop: dict[str, Any] | None) -> list[tuple[str, Any]]:
    """What the closed loop did, where there was one."""
    if not loop:
        return []
    return [
        ("share of a change kept", number(loop["share"], 2)),
        ("  faces with less than all", loop["less"]),
        ("faces strengthened", loop["faces"]),
        ("  in rounds", loop["rounds"]),
    ]


def exit_status(result: dict[str, Any]) -> int:
    """0 where nothing failed (weak photos are warned of, not failures), 1 where a photo failed or is still to do."""
    return 1 if result["error"] or result["pending"] else 0
