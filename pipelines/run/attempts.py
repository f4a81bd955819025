"""Failed rows that are to be made again.

A part is never changed, so a photo that failed gets another key at the stage where it failed, and with it at all later
ones: the old key hashed once more (`again`). Which keys are replaced so is kept in RUN/retries/*.parquet, one file a
request, each with the columns `stage` and `key`. A key stands for one version of a photo and of the settings, so an
entry has no effect on any other; and the rows of all other photos keep their keys, and are not touched.
"""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa

from cluster import hash_key
from pipelines.run.folder import Run

FOLDER = "retries"
SCHEMA = pa.schema([("stage", pa.string()), ("key", pa.string())])


def again(key: str) -> str:
    """The key of the next attempt at the same work."""
    return hash_key("again", key)


def opened(run: Run) -> dict[str, set[str]]:
    """Keys that count no more, by stage: their photos are to have `again(key)`.

    Raises:
        RunError: unreadable requests.
    """
    found: dict[str, set[str]] = {}
    for name in run.names(FOLDER):
        if name.endswith(".parquet"):
            table = run.read_table(f"{FOLDER}/{name}")
            for stage, key in zip(table["stage"].to_pylist(), table["key"].to_pylist(), strict=True):
                found.setdefault(stage, set()).add(key)
    return found


def current(key: str, opened_keys: Collection[str]) -> str:
    """The key that counts now: as many attempts on as were asked for."""
    while key in opened_keys:
        key = again(key)
    return key
