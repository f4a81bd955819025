"""Rows of a run that failed or came out weak."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.files import Files
from pipelines.config.names import STAGES
from pipelines.run.folder import Run
from pipelines.run.schemas import ERROR, WEAK
from pipelines.run.tables import read_stage


def errors(url: str, weak: bool = True) -> list[dict[str, Any]]:
    """Rows that are not well, by path: the publish stage's, and those of photos that have not come so far.

    Raises:
        RunError: not a run's folder.
    """
    run = Run(url)
    plan = run.plan()
    paths = dict(zip(plan["photo_id"].to_pylist(), plan["path"].to_pylist(), strict=True))
    order = {photo_id: i for i, photo_id in enumerate(paths)}
    wanted = (ERROR, WEAK) if weak else (ERROR,)
    rows: dict[tuple[str, str | None], dict[str, Any]] = {}
    for stage in STAGES:  # a later stage carries the row of an earlier one
        columns = ["photo_id", "face_id", "status", "reason", "failed_stage"]
        for row in read_stage(run, stage, columns).to_pylist():
            if row["status"] in wanted:
                rows[row["photo_id"], row["face_id"]] = row
    found = [{"path": paths[row["photo_id"]]} | row for row in rows.values()]
    return sorted(found, key=lambda row: (order[row["photo_id"]], row["face_id"] or ""))


_ERROR_COLUMNS = ("path", "photo_id", "face_id", "status", "reason", "failed_stage")


def by_reason(rows: list[dict[str, Any]], examples: int = 3) -> list[dict[str, Any]]:
    """Rows of `errors` counted by status, code of the reason and stage, most frequent first, with some of each."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        code = (row["reason"] or "").split(":")[0]
        groups.setdefault((row["status"], code, row["failed_stage"] or ""), []).append(row)
    found = [
        {
            "status": status,
            "code": code,
            "failed_stage": stage,
            "rows": len(members),
            "photos": len({row["photo_id"] for row in members}),
            "examples": [{"path": row["path"], "reason": row["reason"]} for row in members[:examples]],
        }
        for (status, code, stage), members in groups.items()
    ]
    return sorted(found, key=lambda group: (-group["rows"], group["status"], group["code"], group["failed_stage"]))


def write_errors(rows: list[dict[str, Any]], file: str) -> None:
    """Rows of `errors` as a Parquet file (path or fsspec URL), all columns strings."""

    schema = pa.schema([(name, pa.string()) for name in _ERROR_COLUMNS])
    files = Files(file)
    with files.fs.open(files.root, "wb") as sink:  # not put in its place by name: it may be a device or pipe
        pq.write_table(pa.Table.from_pylist(rows, schema), sink, compression="zstd")
