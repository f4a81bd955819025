"""Prometheus metrics of a driver, through Ray's own metrics API, which exports them with `ray_` before the name.

The driver counts what workers report, so a worker that dies takes no count with it. `cluster/deploy/grafana.json` shows
them; a test holds the two together.
"""

from __future__ import annotations

from typing import Any

from cluster import Progress

_STAGE = ("stage",)
# name -> (kind, tags, description)
METRICS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "scol_rows_total": ("Counter", ("stage", "status"), "Rows written; at publish: faces, and photos without one"),
    "scol_shards_total": ("Counter", _STAGE, "Parts committed"),
    "scol_operator_seconds_total": ("Counter", _STAGE, "Seconds inside operators, summed over workers"),
    "scol_worker_seconds_total": ("Counter", _STAGE, "The same with reading and writing parts"),
    "scol_bytes_total": ("Counter", _STAGE, "Bytes of the rows written, before compression"),
    "scol_failed_photos_total": ("Counter", ("stage", "reason"), "Photos failed by the engine, not by an operator"),
    "scol_retried_photos_total": ("Counter", _STAGE, "Photos run again because a worker died"),
    "scol_workers_replaced_total": ("Counter", (), "Workers that died and were replaced"),
    "scol_photos_left": ("Gauge", _STAGE, "Photos that the stage has still to do"),
    "scol_queued_photos": ("Gauge", _STAGE, "Photos that wait for a worker at the stage"),
    "scol_workers": ("Gauge", ("pool", "state"), "Workers of a pool: ready, and wanted"),
    "scol_peak_bytes": ("Gauge", _STAGE, "Largest resident size of the worker that did the last shard"),
}


class Metrics:
    """Turns the engine's messages into metrics; nothing before workers are there, since Ray may not run yet."""

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        self._seen: dict[tuple[str, ...], float] = {}

    def __call__(self, progress: Progress) -> None:
        if not progress.workers:
            return
        import ray  # late: it takes a second, which processes that start no Ray need not pay
        from ray.util import metrics

        if not ray.is_initialized():
            return
        if not self._metrics:
            for name, (kind, tags, description) in METRICS.items():
                self._metrics[name] = getattr(metrics, kind)(name, description=description, tag_keys=tags)
        stage = {"stage": progress.stage}
        self._set("scol_photos_left", progress.total - progress.done, stage)
        self._set("scol_queued_photos", progress.queued, stage)
        for pool, (ready, wanted) in progress.workers.items():
            self._set("scol_workers", ready, {"pool": pool, "state": "ready"})
            self._set("scol_workers", wanted, {"pool": pool, "state": "wanted"})
        self._raise("scol_retried_photos_total", progress.retried, stage)
        self._raise("scol_workers_replaced_total", progress.restarts, {})
        shard = progress.shard
        if shard is None:
            return
        self._add("scol_shards_total", 1, stage)
        for status, count in shard.statuses.items():
            self._add("scol_rows_total", count, stage | {"status": status})
        for failure in shard.failures:
            self._add("scol_failed_photos_total", 1, stage | {"reason": failure.reason.split(":")[0]})
        self._add("scol_operator_seconds_total", shard.operator_seconds, stage)
        self._add("scol_worker_seconds_total", shard.seconds, stage)
        self._add("scol_bytes_total", shard.bytes, stage)
        self._set("scol_peak_bytes", shard.peak_bytes, stage)

    def _set(self, name: str, value: float, tags: dict[str, str]) -> None:
        self._metrics[name].set(value, tags)

    def _add(self, name: str, value: float, tags: dict[str, str]) -> None:
        if value > 0:
            self._metrics[name].inc(value, tags)

    def _raise(self, name: str, total: float, tags: dict[str, str]) -> None:
        """Bring a counter to a total that only grows."""
        key = (name, *tags.values())
        self._add(name, total - self._seen.get(key, 0), tags)
        self._seen[key] = total
