"""What a driver tells about itself while it works: in the heartbeat that `scol status` shows (`presence`), in a
structured log (`logs`), and as metrics (`metrics`)."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import numpy as np

from cluster import Progress
from pipelines.run.folder import Run
from pipelines.run.logs import JsonLog
from pipelines.run.metrics import Metrics
from pipelines.run.schemas import ERROR, WEAK

_WINDOW = 300.0  # seconds over which a stage's rate is taken
_LAST = 10  # errors that are shown


class Observer:
    """Listens to the engine, and tells what it has heard. Its `__call__` runs in the driver's loop and does next to
    nothing; what takes time, as looking into parts for the rows that failed, is left to `work`, in another thread.

    Attributes:
        log: where events go; None for nowhere.
        photos: ids of the run's photos as uint64, in the order of the source table; needed where there is a log.
    """

    def __init__(self, run: Run) -> None:
        self.store = run.store
        self.log: JsonLog | None = None
        self.photos: np.ndarray | None = None
        self._metrics = Metrics()
        self._lock = threading.Lock()
        self._stages: dict[str, Progress] = {}
        self._kept: dict[str, int] = {}
        self._pace: dict[str, deque[tuple[float, int]]] = {}
        self._workers: dict[str, tuple[int, int]] = {}
        self._restarts = 0
        self._failing: deque[tuple[str, str]] = deque()  # stage, part
        self._errors: deque[dict[str, Any]] = deque(maxlen=_LAST)

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        self._metrics(progress)
        self._to_log(progress)
        with self._lock:
            name = progress.stage
            if name not in self._stages:  # said of every stage at the start: what an earlier run has done
                self._kept[name], self._pace[name] = progress.done, deque()
            self._stages[name] = progress
            pace = self._pace[name]
            pace.append((now, progress.done))
            while len(pace) > 2 and pace[1][0] < now - _WINDOW:
                pace.popleft()
            self._workers = dict(progress.workers) or self._workers
            self._restarts = progress.restarts
            shard = progress.shard
            if shard is not None and (shard.statuses.get(ERROR) or (self.log and shard.statuses.get(WEAK))):
                self._failing.append((name, progress.shard.part))

    def _to_log(self, progress: Progress) -> None:
        if self.log is None:
            return
        stage, shard = progress.stage, progress.shard
        if stage not in self._stages:
            self.log.event("stage", stage=stage, total=progress.total, kept=progress.done)
        if shard is not None:
            self.log.event(
                "shard",
                stage=stage,
                part=shard.part,
                photos=[f"{photo:016x}" for photo in self.photos[list(progress.items)].tolist()],
                rows=shard.statuses,
                seconds=round(shard.seconds, 3),
                operator_seconds=round(shard.operator_seconds, 3),
                bytes=shard.bytes,
                committed=shard.committed,
            )
        elif progress.restarts > self._restarts:
            self.log.event("worker_replaced", stage=stage, restarts=progress.restarts, retried=progress.retried)

    def work(self) -> None:
        """Look up the rows that failed, for the log also those that came out weak, in the shards finished since the
        last call."""
        columns = ["photo_id", "face_id", "status", "reason", "failed_stage"]
        while self._failing:
            stage, part = self._failing[0]
            for row in self.store.read_part(stage, part, columns).to_pylist():
                if row["status"] not in (ERROR, WEAK) or row["failed_stage"] != stage:
                    continue  # well, or told by an earlier stage
                if row["status"] == ERROR:
                    self._errors.append(row)
                if self.log is not None:
                    told = {name: row[name] for name in ("photo_id", "face_id", "status", "reason")}
                    self.log.event("row", stage=stage, part=part, **told)
            self._failing.popleft()

    def tell(self) -> dict[str, Any]:
        """For the heartbeat: `stages`, by name: `total`, `kept` (by earlier runs), `done` (with these), `failed` items,
        `retried`, `queued`, `rows` by status, `rate` (items a second over the last five minutes, null before the first)
        and `seconds_left`; `workers` by pool (ready, wanted); `restarts`; `last_errors`."""
        with self._lock:
            stages, now = {}, time.monotonic()
            for name, progress in self._stages.items():
                (begin, first), rate = self._pace[name][0], None
                if progress.done > first:
                    rate = (progress.done - first) / max(1e-3, now - begin)
                left = progress.total - progress.done
                stages[name] = {
                    "total": progress.total,
                    "kept": self._kept[name],
                    "done": progress.done,
                    "failed": progress.failed,
                    "retried": progress.retried,
                    "queued": progress.queued,
                    "rows": dict(progress.statuses),
                    "rate": rate,
                    "seconds_left": left / rate if rate else 0.0 if not left else None,
                }
            return {
                "stages": stages,
                "workers": {pool: list(counts) for pool, counts in self._workers.items()},
                "restarts": self._restarts,
                "last_errors": list(self._errors),
            }
