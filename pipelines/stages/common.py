"""What all stages share: rows in and out of Arrow, carried rows, one face at a time under its time limit."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from cluster import ItemTimeout
from cluster.worker import one_line, time_limit
from pipelines import manifests
from pipelines.manifests import ERROR, OK, row_seed
from pipelines.photo import PhotoError
from pipelines.sources import SourceError
from scol_ops.metrics import to_uint8
from scol_ops.tuning import DeadlineExceeded
from scol_ops.warp import crop_transform, invert_affine, transform_boxes, transform_points

Row = dict[str, Any]
HARD_MARGIN = 30.0  # s, beyond twice the time limit: then the process is ended


class FaceError(Exception):
    """A face that cannot be treated, with its reason's code. `str()` is `CODE: words`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")


# ---- rows ------------------------------------------------------------------------------------------------------------


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


def to_table(stage: str, rows: Sequence[Mapping[str, Any]], layers: int = manifests.CODE_LAYERS) -> pa.Table:
    """Rows in a stage's schema, for a generator of so many codes; what a row does not have is null."""
    schema = manifests.stage_schema(stage, layers)
    return pa.table([pa.array([row.get(f.name) for row in rows], f.type) for f in schema], schema=schema)


def base_row(row: Mapping[str, Any], weights: str, seconds: float = 0.0) -> Row:
    """The common columns of a row that goes on."""
    names = ("key", "photo_id", "face_id", "status", "reason", "failed_stage", "seed")
    return {name: row.get(name) for name in names} | {"weights": weights, "seconds": seconds}


def failed(row: Mapping[str, Any], stage: str, reason: str, weights: str = "", seconds: float = 0.0) -> Row:
    """A row that fails at this stage."""
    return base_row(row, weights, seconds) | {"status": ERROR, "reason": reason, "failed_stage": stage}


def error_rows(
    stage: str, run_seed: int, table: pa.Table, reason: str, layers: int = manifests.CODE_LAYERS
) -> pa.Table:
    """What the engine writes where the operator could not: rows that failed before stay as they were."""
    wanted = [name for name in (*(f.name for f in manifests.COMMON), "source.path") if name in table.column_names]
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
    layers: int = manifests.CODE_LAYERS,
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
            with time_limit(limit * 1.1, 2 * limit + HARD_MARGIN):
                answer = treat(row, begin + limit)
            answer = base_row(row, weights, time.monotonic() - begin) | answer
        except (Exception, ItemTimeout) as error:
            raise_if_unfit(error)
            answer = failed(row, stage, reason_of(error), weights, time.monotonic() - begin)
        out.append(answer)
    return to_table(stage, out, layers)


def raise_if_unfit(error: BaseException) -> None:
    """A CUDA context that has failed stays failed: the process has to go."""
    from cluster import WorkerUnfit

    if isinstance(error, RuntimeError) and "CUDA error" in str(error):
        raise WorkerUnfit(str(error)) from error


# ---- pictures and geometry -------------------------------------------------------------------------------------------


def encode_png(picture: Tensor) -> bytes:
    """(1, 3, S, S) or (3, S, S) in [-1, 1] to PNG, rounded to 8 bits."""
    pixels = to_uint8(picture[0] if picture.ndim == 4 else picture)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def decode_png(data: bytes, device: torch.device | str = "cpu") -> Tensor:
    """PNG to (1, 3, S, S) float32 in [-1, 1]."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return to_tensor(np.asarray(image.convert("RGB")), device)


def to_tensor(pixels: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (H, W, 3) to (1, 3, H, W) float32 in [-1, 1]."""
    tensor = torch.from_numpy(np.array(pixels)).to(device)
    return tensor.permute(2, 0, 1)[None].float() / 127.5 - 1


def geometry_in_crop(
    row: Mapping[str, Any], size: int, device: torch.device, prefix: str = ""
) -> tuple[Tensor, Tensor]:
    """A face's landmarks (1, 5, 2) and box (1, 4) in pixels of its crop, float32."""
    quad = torch.from_numpy(np.array(row[prefix + "quad"], np.float64)).reshape(4, 2)
    to_crop = invert_affine(crop_transform(quad, size))
    landmarks = torch.from_numpy(np.array(row[prefix + "landmarks"], np.float64)).reshape(5, 2)
    box = torch.from_numpy(np.array(row[prefix + "box"], np.float64)).reshape(1, 4)
    landmarks = transform_points(landmarks, to_crop)[None].float().to(device)
    return landmarks, transform_boxes(box, to_crop).float().to(device)


def photo_side(row: Mapping[str, Any], prefix: str = "") -> float:
    """Side of a face's crop in pixels of its photo (mean of the quad's four)."""
    corners = np.array(row[prefix + "quad"], np.float64).reshape(4, 2)
    return float(np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1).mean())


def as_codes(vector: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """A manifest's vector to (1, L, 512)."""
    array = np.array(vector, np.float32).reshape(1, -1, manifests.CODE_DIM)
    return torch.from_numpy(array).to(device)


def as_vector(codes: Tensor) -> np.ndarray:
    """(1, L, 512) or (L, 512) to a manifest's vector of L x 512 float32."""
    return codes.detach().float().cpu().reshape(-1).numpy()
