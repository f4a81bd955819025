"""A chain of stages that computes with numbers, and fails or dawdles where an item's `mode` tells it to.

The engine's tests and its chaos campaign run it: it is fast, an item has several rows, and what must come out is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from cluster import Stage, hash_key

COMMON = [("key", pa.string()), ("status", pa.string()), ("reason", pa.string())]
PARTS = pa.schema([*COMMON, ("row", pa.int64()), ("value", pa.int64())])
TOTAL = pa.schema([*COMMON, ("total", pa.int64()), ("n", pa.int64())])


def source_table(modes: list[str], salt: str = "") -> pa.Table:
    """Items 0, 1, 2, ... with one mode each."""
    keys = [hash_key("source", salt, i) for i in range(len(modes))]
    return pa.table(
        {
            "key": pa.array(keys, pa.string()),
            "n": pa.array(range(len(modes)), pa.int64()),
            "mode": pa.array(modes, pa.string()),
        }
    )


def chain(source: pa.Table, versions: dict[str, str]) -> dict[str, list[str]]:
    """Keys of every item at every stage."""
    keys, before = {}, source["key"].to_pylist()
    for name, version in versions.items():
        before = keys[name] = [hash_key(name, version, key) for key in before]
    return keys


def obey(mode: str) -> None:
    """`bad` raises, `slow:SECONDS` takes so long.

    Raises:
        ValueError: of `bad`.
    """
    kind, _, seconds = mode.partition(":")
    if kind == "bad":
        raise ValueError("bad item")
    if kind == "slow":
        time.sleep(float(seconds))


def make_split(log: str | None = None, obey: Callable[[str], None] = obey):
    """n -> n % 3 + 1 rows with the values 10 n, 10 n + 1, ... Appends each item worked on to a file `log`.

    Args:
        obey: is given each item's mode.
    """

    def split(rows: pa.Table) -> pa.Table:
        out = []
        for item in rows.to_pylist():
            if log:
                with open(log, "a") as file:
                    file.write(f"{item['n']}\n")
            if item["mode"] == "lose":
                continue
            obey(item["mode"])
            for row in range(item["n"] % 3 + 1):
                key = "0" * 32 if item["mode"] == "invent" else item["key"]
                out.append({"key": key, "status": "ok", "reason": None, "row": row, "value": 10 * item["n"] + row})
        return pa.Table.from_pylist(out, PARTS)

    return split


def make_square(rate: float = 1.0):
    """value -> value squared, one row for one."""

    def square(rows: pa.Table) -> pa.Table:
        good = pc.equal(rows["status"], "ok")
        value = pc.if_else(good, pc.multiply(rows["value"], rows["value"]), None)
        return rows.set_column(rows.schema.get_field_index("value"), "value", value)

    return square


def make_total():
    """Sum of an item's squares, minus the values that `split` gave (a joined column); one row an item."""

    def total(rows: pa.Table) -> pa.Table:
        rows = rows.append_column("difference", pc.subtract(rows["value"], rows["split.value"]))
        groups = rows.group_by("key", use_threads=False).aggregate(
            [("difference", "sum"), ("source.n", "min"), ("status", "min"), ("reason", "min")]
        )
        return groups.rename_columns(
            {"difference_sum": "total", "source.n_min": "n", "status_min": "status", "reason_min": "reason"}
        )

    return total


def failed_parts(rows: pa.Table, reason: str) -> pa.Table:
    row = {"key": rows["key"][0].as_py(), "status": "error", "reason": reason, "row": 0, "value": None}
    return pa.Table.from_pylist([row], PARTS)


def failed_total(rows: pa.Table, reason: str) -> pa.Table:
    row = {"key": rows["key"][0].as_py(), "status": "error", "reason": reason, "total": None, "n": None}
    return pa.Table.from_pylist([row], TOTAL)


VERSIONS = {"split": "1", "square": "1", "total": "1"}


def stages(log: str | None = None, last_pool: str = "default", **split_settings) -> list[Stage]:
    """split -> square -> total; `split_settings` override the first stage's attributes."""
    first = dict(factory=partial(make_split, log), error_rows=failed_parts, columns=["n", "mode"], batch_items=4)
    return [
        Stage("split", "1", PARTS, **{**first, **split_settings}),
        Stage("square", "1", PARTS, make_square, failed_parts, batch_items=8, row_id="row"),
        Stage(
            "total", "1", TOTAL, make_total, failed_total, columns=["value", "status", "reason"], pool=last_pool,
            joins={"split": ["value"], "source": ["n"]}, row_id="row", batch_items=8,
        ),
    ]  # fmt: skip


def expected_total(n: int) -> int:
    """What `total` must say for item n."""
    return sum((10 * n + row) ** 2 - (10 * n + row) for row in range(n % 3 + 1))
