"""What all stages share: rows in and out of Arrow, carried rows, one face at a time under its time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pyarrow as pa

from cluster import ItemTimeout, WorkerUnfit
from cluster.worker import is_worker, one_line, time_limit
from pipelines.archive.paths import SourceError
from pipelines.photos.photo import PhotoError
from pipelines.run import schemas
from pipelines.run.schemas import ERROR, OK, row_seed
from scol_ops.tuning import DeadlineExceeded

Row = dict[str, Any]
_HARD_MARGIN = 30.0  # s, beyond twice the time limit: then the process is ended


class FaceError(Exception):
    """A face that cannot be treated, with its reason's code. `str()` is `CODE: words`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")


def iterate(table: pa.Table) -> Iterator[Row]:
    """Rows as dicts; vectors of fixed length as numpy arrays, pictures as bytes, the rest as plain Python."""
    columns = {}
    for field in table.schema:
        column = table[field.name]
        if pa.types.is_fixed_size_list(field.type):
            columns[field.name] = [
                scalar.values.to_numpy(zero_copy_only=False) if scalar.is_valid else None
                for chunk in column.chunks
                for scalar in chunk
            ]
        else:
            columns[field.name] = column.to_pylist()
    names = list(columns)
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(names, values, strict=True))


def to_table(stage: str, rows: Sequence[Mapping[str, Any]], layers: int = schemas.CODE_LAYERS) -> pa.Table:
    """Rows in a stage's schema, for a generator of so many codes; what a row does not have is null."""
    schema = schemas.stage_schema(stage, layers)
    return pa.table([pa.array([row.get(f.name) for row in rows], f.type) for f in schema], schema=schema)


def base_row(row: Mapping[str, Any], weights: str, seconds: float = 0.0) -> Row:
    """The common columns of a row that goes on."""
    names = ("key", "photo_id", "face_id", "status", "reason", "failed_stage", "seed")
    return {name: row.get(name) for name in names} | {"weights": weights, "seconds": seconds}


def failed(row: Mapping[str, Any], stage: str, reason: str, weights: str = "", seconds: float = 0.0) -> Row:
    """A row that fails at this stage."""
    return base_row(row, weights, seconds) | {"status": ERROR, "reason": reason, "failed_stage": stage}


def error_rows(
    stage: str, run_seed: int, table: pa.Table, reason: str, layers: int = schemas.CODE_LAYERS
) -> pa.Table:
    """What the engine writes where the operator could not: rows that failed before stay as they were."""
    wanted = [name for name in (*(f.name for f in schemas.COMMON), "source.path") if name in table.column_names]
    out = []
    for row in iterate(table.select(wanted)):
        row.setdefault("face_id", None)
        row.setdefault("seed", row_seed(run_seed, row["photo_id"]))
        answer = base_row(row, "") if row["status"] != OK else failed(row, stage, reason)
        out.append(answer | {"path": row.get("source.path"), "action": "none"})
    return to_table(stage, out, layers)


def reason_of(error: BaseException) -> str:
    """`CODE: words` for anything that an operator raised."""
    if isinstance(error, FaceError | PhotoError | SourceError):
        return str(error)
    if isinstance(error, ItemTimeout | DeadlineExceeded):
        return f"TIMEOUT: {error or 'the time limit of a face'}"
    if isinstance(error, FloatingPointError):
        return f"DIVERGED: {one_line(error)}"
    return f"EXCEPTION: {type(error).__name__}: {one_line(error)}"


def each_face(
    stage: str,
    table: pa.Table,
    weights: str,
    limit: float,
    treat: Callable[[Row, float], Row],
    layers: int = schemas.CODE_LAYERS,
) -> pa.Table:
    """Call ``treat`` for every face that is well; carry the others.

    Args:
        limit: seconds that one face may take.
        treat: (row, deadline on ``time.monotonic()``) -> payload columns.
        layers: codes of the generator.
    """
    out = []
    for row in iterate(table):
        if row["status"] != OK:
            out.append(base_row(row, weights))
            continue
        begin = time.monotonic()
        try:
            # The inner limit is checked between steps and costs nothing; the outer one ends what does not come back.
            with face_time(limit * 1.1, limit):
                answer = treat(row, begin + limit)
            answer = base_row(row, weights, time.monotonic() - begin) | answer
        except (Exception, ItemTimeout) as error:
            raise_if_unfit(error)
            answer = failed(row, stage, reason_of(error), weights, time.monotonic() - begin)
        out.append(answer)
    return to_table(stage, out, layers)


def face_time(soft: float, limit: float) -> AbstractContextManager[None]:
    """Bounds a block's time: after `soft` seconds ``ItemTimeout``; a worker that hangs is ended, well after twice the
    limit of a face. A process that is not a worker is never ended."""
    return time_limit(soft, 2 * limit + _HARD_MARGIN if is_worker() else None)


def raise_if_unfit(error: BaseException) -> None:
    """A CUDA context that has failed stays failed: the process has to go."""

    if isinstance(error, RuntimeError) and "CUDA error" in str(error):
        raise WorkerUnfit(str(error)) from error
