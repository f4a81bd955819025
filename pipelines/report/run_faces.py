"""Pictures of a run's faces, before and after."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.archive.paths import SourceError
from pipelines.archive.reading import digest_of, read_bytes
from pipelines.photos.codec import decode
from pipelines.photos.photo import MAX_BYTES, PhotoError
from pipelines.report.pictures import Pixels, difference
from pipelines.run.folder import Run
from pipelines.run.schemas import SCHEMAS, SOURCE

_LAST = ("attack", "strengthen")  # a face's last picture is of the later one that has any


@dataclass(frozen=True, eq=False)
class FacePictures:
    """A face's aligned crop before and after, uint8 (S, S, 3) RGB.

    Attributes:
        original: as it was aligned.
        protected: None where the run has none yet.
        saved: `protected` was cut out of the saved file; otherwise it is as the last stage left it.
        windows: original photo and saved file about the face in the photo's own pixels, uint8 (H, W, 3) each; None
            where one of them cannot be read any more, or has changed its size.
    """

    original: Pixels
    protected: Pixels | None
    saved: bool = False
    windows: tuple[Pixels, Pixels] | None = None

    def difference(self) -> Pixels | None:
        """See `pictures.difference`; None where there is no picture after, or one of another size."""
        if self.protected is None or self.protected.shape != self.original.shape:
            return None
        return difference(self.original, self.protected)


def _decode(data: bytes | None) -> Pixels | None:
    if data is None:
        return None
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # a report leaves a picture out rather than fail


def read_crops(run: Run | str, face_ids: Iterable[str], stage: str, column: str) -> dict[str, Pixels]:
    """Pictures of some faces from a stage's table, uint8 (S, S, 3); faces that have none there are left out.

    Raises:
        RunError, StoreError: see `run.tables.read_stage`.
    """
    return {face: pixels for face, row in _face_rows(run, face_ids, stage, [column]).items()
            if (pixels := _decode(row[column])) is not None}


def _face_rows(
    run: Run | str, face_ids: Iterable[str], stage: str, columns: Sequence[str]
) -> dict[str, dict[str, Any]]:
    run = run if isinstance(run, Run) else Run(str(run))
    wanted = set(face_ids)
    if not wanted:
        return {}
    photo_ids = {face.rsplit("-", 1)[0] for face in wanted}
    plan = run.plan()
    chosen = plan.filter(pa.array([p in photo_ids for p in plan["photo_id"].to_pylist()], pa.bool_()))
    keys, schema = chosen[stage].to_pylist(), SCHEMAS[stage]
    rows = run.store.read_rows(stage, keys, ["face_id", *columns], later=schema)  # older versions had fewer columns
    return {row["face_id"]: row for row in rows.to_pylist() if row["face_id"] in wanted} if rows.num_rows else {}


def read_pictures(run: Run | str, face_ids: Iterable[str], windows: bool = False) -> dict[str, FacePictures]:
    """Before and after of some faces: the original from the manifests, the protected one from the saved file.

    Where the saved file cannot be read (moved, another machine) the picture after is the one that the last stage left
    in the manifests.

    Args:
        windows: also cut the windows, for which the original photos are read.

    Raises:
        RunError, StoreError: see `run.tables.read_stage`.
    """
    face_ids = list(face_ids)
    aligned = _face_rows(run, face_ids, "align", ["crop", "content", "quad", "width", "height"])
    published = _face_rows(run, face_ids, "publish", ["action", "out_path"])
    urls = _photo_urls(run, face_ids) if windows else {}
    made: dict[str, Pixels] | None = None
    out: dict[str, FacePictures] = {}
    read = functools.lru_cache(2)(_read_photo)  # faces of one photo come one after the other
    for face in face_ids:
        row, done = aligned.get(face), published.get(face)
        original = _decode(row["crop"]) if row else None
        if original is None:
            continue
        cut = saved = None
        if done and done["action"] == "protected" and done["out_path"] and row["quad"] is not None:
            saved = read(done["out_path"])
            cut = _cut(saved, row, len(original))
        if cut is None:
            if made is None:
                made = {f: p for stage in _LAST for f, p in read_crops(run, face_ids, stage, "protected").items()}
            out[face] = FacePictures(original, made.get(face))
        else:
            url = urls.get(face.rsplit("-", 1)[0])
            both = None if url is None else _windows(read(url, row["content"]), saved, row["quad"])
            out[face] = FacePictures(original, cut, saved=True, windows=both)
    return out


def _photo_urls(run: Run | str, face_ids: Iterable[str]) -> dict[str, str]:
    """URLs of the original photos of some faces, by photo_id."""
    run = run if isinstance(run, Run) else Run(str(run))
    wanted, plan = {face.rsplit("-", 1)[0] for face in face_ids}, run.plan(["photo_id", SOURCE])
    chosen = plan.filter(pa.array([p in wanted for p in plan["photo_id"].to_pylist()], pa.bool_()))
    rows = run.store.read_rows(SOURCE, chosen[SOURCE].to_pylist(), ["photo_id", "url"], schema=SCHEMAS[SOURCE])
    return {row["photo_id"]: row["url"] for row in rows.to_pylist()}


def _windows(original: Pixels | None, saved: Pixels, quad: Sequence[float]) -> tuple[Pixels, Pixels] | None:
    """The face's window in both photos; None where one of them cannot be read, or has changed its size."""
    if original is None:
        return None
    from pipelines.report.windows import windows_of  # late: it loads PyTorch

    return windows_of(original, saved, quad)


def _read_photo(url: str, content: str | None = None) -> Pixels | None:
    """None where it cannot be read, or is not the file of this content (`align.content`; None: whichever it is)."""
    try:
        data = read_bytes(url, 2 * MAX_BYTES)
        return decode(data).pixels if content in (None, digest_of(data)) else None
    except (SourceError, PhotoError):
        return None


def _cut(photo: Pixels | None, row: Mapping[str, Any], size: int) -> Pixels | None:
    """The aligned crop of a face in a saved photo, cut as the verdict's is."""
    if photo is None or photo.shape[:2] != (row["height"], row["width"]):
        return None
    import torch  # late: seconds that a report without faces need not take

    from scol_ops.alignment import align_crops
    from scol_ops.metrics import to_uint8
    from scol_ops.warp import GeometryError

    quad = torch.tensor(row["quad"], dtype=torch.float64).reshape(1, 4, 2)
    try:
        return to_uint8(align_crops(photo, quad, size)[0])
    except GeometryError:
        return None
