"""Readers of the stages' tables, for reports and scripts: only rows whose keys ``plan.parquet`` names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.digest import read_digest
from pipelines.run.folder import Run, RunError
from pipelines.run.schemas import ERROR, LIGHT, NO_FACE, OK, SCHEMAS, WEAK


def as_run(run: Run | str) -> Run:
    return run if isinstance(run, Run) else Run(str(run))


def read_stage(run: Run | str, stage: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of a stage that count now, in the order of paths; photos that have not come so far have none. Columns that
    parts of an older version lack are null.

    Raises:
        RunError: not a run's folder, or an unknown stage.
        StoreError: unreadable parts.
    """
    run = as_run(run)
    if stage not in SCHEMAS:
        raise RunError(f"no stage {stage!r}; there are {', '.join(SCHEMAS)}")
    keys = run.plan([stage])[stage]
    if columns is None or not set(columns) <= set(LIGHT[stage].names):
        return run.store.read_rows(stage, keys.to_pylist(), columns, schema=SCHEMAS[stage], later=SCHEMAS[stage])
    return in_order(
        read_digest(run.store, stage, list(dict.fromkeys(["key", *columns])), LIGHT[stage]), keys, stage
    ).select(list(columns))


def in_order(rows: pa.Table, keys: pa.ChunkedArray, stage: str) -> pa.Table:
    """Those of a stage's rows that have one of the keys, in the order of the keys."""
    if not rows.num_columns:
        return SCHEMAS[stage].empty_table()
    place = pc.index_in(rows["key"], value_set=keys.combine_chunks())
    rows, place = rows.filter(pc.is_valid(place)), place.drop_null().to_numpy()
    return rows if np.all(place[1:] >= place[:-1]) else rows.take(pa.array(np.argsort(place, kind="stable")))


def scan_stage(
    run: Run | str, stage: str, columns: Sequence[str] | None = None, photos: int = 512
) -> Iterator[pa.Table]:
    """As `read_stage`, in pieces of some photos, in the same order: for columns too large for the memory."""
    run = as_run(run)
    if stage not in SCHEMAS:
        raise RunError(f"no stage {stage!r}; there are {', '.join(SCHEMAS)}")
    store = run.store
    index = store.index(stage)
    keys = run.plan()[stage].combine_chunks()
    place = pc.index_in(keys, value_set=index["key"].combine_chunks())
    parts = index["part"].combine_chunks().take(place)
    for first in range(0, len(keys), photos):
        names = {name for name in parts[first : first + photos].to_pylist() if name is not None}
        if names:
            yield store.read_rows(stage, keys[first : first + photos].to_pylist(), columns, names, SCHEMAS[stage])


def read_photos(run: Run | str) -> pa.Table:
    """One row a photo, by path: photo_id, path, status, reason, failed_stage, action, out_path, faces.

    A photo's status is the worst of its faces' (`error`, `weak`, `ok`), `no_face`, or `pending` where it has not been
    published yet.
    """
    run = as_run(run)
    plan = run.plan()
    columns = ["photo_id", "face_id", "status", "reason", "failed_stage", "action", "out_path"]
    rows: dict[str, dict[str, Any]] = {}
    worst = {ERROR: 3, WEAK: 2, OK: 1, NO_FACE: 0}
    for row in read_stage(run, "publish", columns).to_pylist():
        seen = rows.get(row["photo_id"])
        faces = (seen["faces"] if seen else 0) + (row["face_id"] is not None)
        if seen is None or worst[row["status"]] > worst[seen["status"]]:
            rows[row["photo_id"]] = row
        rows[row["photo_id"]]["faces"] = faces
    out = []
    for photo_id, path in zip(plan["photo_id"].to_pylist(), plan["path"].to_pylist(), strict=True):
        row = rows.get(photo_id) or {"status": "pending", "faces": None}
        out.append(
            {"photo_id": photo_id, "path": path}
            | {name: row.get(name) for name in ("status", "reason", "failed_stage", "action", "out_path", "faces")}
        )
    return pa.Table.from_pylist(
        out,
        pa.schema(
            [
                ("photo_id", pa.string()),
                ("path", pa.string()),
                ("status", pa.string()),
                ("reason", pa.string()),
                ("failed_stage", pa.string()),
                ("action", pa.string()),
                ("out_path", pa.string()),
                ("faces", pa.int32()),
            ]
        ),
    )
