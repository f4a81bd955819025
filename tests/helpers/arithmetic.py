"""The chain of `pipelines.bench.arithmetic`, and what only the tests need."""

import pyarrow as pa

from cluster import PartStore, hash_key
from pipelines.bench.arithmetic import (
    COMMON,
    PARTS,
    VERSIONS,
    chain,
    expected_total,
    failed_parts,
    make_square,
    source_table,
    stages,
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


def race(path, number, barrier, results):
    """Write the same 20 parts as other processes do at the same moment; report which of them were committed."""
    store = PartStore(path)
    won = []
    for turn in range(20):
        table = pa.table({"key": [hash_key(turn)], "value": [number]})
        barrier.wait(60)
        won.append(store.write_part("s", None, table))
    results.put((number, won))
