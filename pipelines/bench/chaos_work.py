"""What the chaos campaign runs: drivers of the arithmetic chain and of the real stages, watched, and interruptible.

The drivers do what any driver does, with two additions that no production code has: every call of an operator is
noted in a log, and a worker that is about to commit a part, or has just done so, stops there when the campaign asks for
it, so that it can be killed at that very point. Environment, inherited by the workers through the campaign's Ray nodes:

    CHAOS_ORDERS   folder; a file `write` or `commit` there makes the next committing process rename it to
                   `write.PID` or `commit.PID` and wait, before the link of its part's temporary file or after it
    CHAOS_LOG      folder of the calls, `PID.jsonl`
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa

from cluster import Engine, Operator, PartStore, Pool, Resources, Stage
from pipelines.bench import arithmetic

ORDERS, LOG = "CHAOS_ORDERS", "CHAOS_LOG"
WRITE, COMMIT = "write", "commit"
ITEM_SECONDS = 0.05
_STOP_SECONDS = 60.0  # a process that obeyed an order and is not killed goes on after this


class WatchedStore(PartStore):
    """A store whose writers stop on order around the commit; see the module."""

    def __reduce__(self):
        return _open, (self.url, self.storage_options, self.allow_unsafe, self.schema_version)

    def _commit_local(self, temp: str, path: str) -> bool:
        obey(WRITE)
        done = super()._commit_local(temp, path)
        obey(COMMIT)
        return done


def _open(url: str, storage_options: dict, allow_unsafe: bool, schema_version: int) -> WatchedStore:
    return WatchedStore(
        url, storage_options=storage_options, allow_unsafe=allow_unsafe, schema_version=schema_version
    )


def obey(point: str) -> None:
    """Stop here if there is an order for this point and nobody else was quicker to take it."""
    orders = Path(os.environ[ORDERS])
    try:
        os.rename(orders / point, orders / f"{point}.{os.getpid()}")
    except FileNotFoundError:
        return
    time.sleep(_STOP_SECONDS)


def watched(stages: Sequence[Stage]) -> list[Stage]:
    """The same stages, whose operators note the beginning and the end of each call."""
    return [replace(stage, factory=partial(_watched_factory, stage.factory, stage.name)) for stage in stages]


def _watched_factory(factory: Callable[[], Operator], stage: str) -> Operator:
    operator = factory()
    path = Path(os.environ[LOG]) / f"{os.getpid()}.jsonl"

    def note(**fields) -> None:
        with open(path, "a") as file:
            file.write(json.dumps({"stage": stage, "time": time.time(), **fields}) + "\n")

    def call(rows: pa.Table) -> pa.Table:
        note(begin=list(dict.fromkeys(rows["key"].to_pylist())))
        answer = operator(rows)
        note(end=True)
        return answer

    return call


def arithmetic_source(items: int) -> pa.Table:
    """The campaign's items: each takes some time, every 50th fails by an exception."""
    return arithmetic.source_table(["bad" if n % 50 == 49 else f"slow:{ITEM_SECONDS}" for n in range(items)])


def run_arithmetic(store: str, items: int, address: str, actors: int) -> None:
    """One driver's life over the arithmetic chain."""
    source = arithmetic_source(items)
    chain = watched(arithmetic.stages(last_pool="sums", batch_items=1))
    pools = {
        name: Pool(actors=count, resources=Resources(num_cpus=0.5, threads=1))
        for name, count in (("default", actors), ("sums", 1))
    }
    engine = Engine(WatchedStore(store), chain, pools=pools, address=address, shard_items=8)
    engine.run(source, arithmetic.chain(source, arithmetic.VERSIONS))


def run_real(src: str, out: str, sets: Sequence[str]) -> int:
    """One driver's life of `scol protect` with the quick profile; how many photos have failed."""
    # late: the arithmetic's drivers and workers need no PyTorch, which takes seconds at every start
    from pipelines.bench.harness import stages_changed
    from pipelines.config.load import load_config
    from pipelines.jobs.protect import protect
    from pipelines.run import folder

    with stages_changed(watched), patch.object(folder, "PartStore", WatchedStore):
        return protect(src, out, load_config("quick", sets=sets), say=print)["error"]
