"""The chain of `pipelines.bench.arithmetic`, and what only the tests need."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pyarrow as pa

from cluster import PartStore, WorkerUnfit, hash_key
from pipelines.bench import arithmetic
from pipelines.bench.arithmetic import (
    COMMON,
    PARTS,
    VERSIONS,
    chain,
    expected_total,
    failed_parts,
    make_split,
    make_square,
    obey,
    source_table,
)

__all__ = [
    "COMMON",
    "PARTS",
    "VERSIONS",
    "chain",
    "expected_total",
    "failed_parts",
    "make_square",
    "race",
    "source_table",
    "stages",
]


def misbehave(mode: str) -> None:
    """What an item's mode asks for; the ways of the real world to fail."""
    obey(mode)
    kind, _, where = mode.partition(":")
    if kind == "raise":
        raise ValueError(f"item is\nbad {'x' * 1000}")
    if kind == "sleep":
        time.sleep(60)
    if kind == "stubborn":  # swallows every Exception
        for _ in range(600):
            try:
                time.sleep(0.1)
            except Exception:
                pass
    if kind == "hang":  # no signal gets through, as in a call into C that does not return
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(60)
    if kind == "exit":
        os._exit(3)
    if kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "unfit":
        raise WorkerUnfit
    if kind == "quit":
        raise SystemExit(1)
    if kind == "kill_once" and not Path(where).exists():
        Path(where).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "term_once" and not Path(where).exists():
        Path(where).touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def stages(log=None, last_pool="default", **split_settings):
    """`arithmetic.stages`, whose first stage misbehaves."""
    first = {"factory": partial(make_split, log, misbehave), **split_settings}
    return arithmetic.stages(log, last_pool, **first)


def race(path, number, barrier, results):
    """Write the same 20 parts as other processes do at the same moment; report which of them were committed."""
    store = PartStore(path)
    won = []
    for turn in range(20):
        table = pa.table({"key": [hash_key(turn)], "value": [number]})
        barrier.wait(60)
        won.append(store.write_part("s", None, table))
    results.put((number, won))
