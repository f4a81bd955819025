"""Stage ``align``: read photos, find the faces, cut an FFHQ-aligned crop of each."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from cluster import Operator, Stage
from pipelines.archive.paths import SourceError
from pipelines.archive.reading import digest_of
from pipelines.config.sections import Config
from pipelines.networks.load import Networks
from pipelines.photos.codec import decode
from pipelines.photos.photo import Photo, PhotoError
from pipelines.run.schemas import NO_FACE, OK, SOURCE, face_id, row_seed
from pipelines.stages.crops import encode_png
from pipelines.stages.declaration import Setting, declared
from pipelines.stages.reading import Reader
from pipelines.stages.rows import FaceError, Row, failed, iterate, reason_of, to_table
from pipelines.stages.saving import limits_of
from scol_ops.alignment import align_crops, ffhq_quads
from scol_ops.warp import GeometryError

if TYPE_CHECKING:  # imports torchvision, which only the detector's workers should pay
    from scol_ops.detection import Face, FaceDetector

# Photos of more pixels than this together are not held decoded at the same time.
_PIXELS_AT_ONCE = 40_000_000


def stage(setting: Setting) -> Stage:
    """Reads the source table; photos of a batch share the detector's passes."""
    engine = setting.config.engine
    return declared(
        "align", setting, pool="photos", columns=None, batch_items=engine.align_batch, item_seconds=engine.face_seconds
    )


def operator(config: Config, weights: str) -> Operator:
    """Loads the detector; the result takes rows of the source table."""
    detector = Networks(config, torch.device("cpu")).detector  # the generators have the GPUs
    limits = limits_of(config)
    reader = Reader(limits.max_bytes)

    def ahead(table: pa.Table) -> None:
        rows = table.select(["url", "size", "status"]).to_pylist()
        reader.ahead([(row["url"], row["size"]) for row in rows if row["status"] == OK])

    def run(table: pa.Table) -> pa.Table:
        answers: dict[int, list[Row]] = {}
        waiting: list[tuple[int, Row, Photo, float]] = []
        for i, row in enumerate(iterate(table)):
            row |= {"face_id": None, "seed": row_seed(config.seed, row["photo_id"])}
            if row["status"] != OK:
                answers[i] = [failed(row, SOURCE, row["reason"], weights)]
                continue
            begin = time.monotonic()
            try:
                data = reader.read(row["url"])
                row["content"] = digest_of(data)
                photo = decode(data, limits)
            except (PhotoError, SourceError) as error:
                answers[i] = [_failed(row, reason_of(error), weights, time.monotonic() - begin)]
                continue
            waiting.append((i, row, photo, time.monotonic() - begin))
            if sum(w[2].width * w[2].height for w in waiting) >= _PIXELS_AT_ONCE:
                answers |= _detect(detector, waiting, config, weights)
                waiting = []
        answers |= _detect(detector, waiting, config, weights)
        return to_table("align", [row for i in sorted(answers) for row in answers[i]])

    run.ahead = ahead
    return run


def _failed(row: Row, reason: str, weights: str, seconds: float) -> Row:
    return failed(row, "align", reason, weights, seconds) | {"content": row.get("content")}


def _detect(
    detector: FaceDetector, photos: list[tuple[int, Row, Photo, float]], config: Config, weights: str
) -> dict[int, list[Row]]:
    if not photos:
        return {}
    begin = time.monotonic()
    found = detector.detect([photo.pixels for _, _, photo, _ in photos])
    detecting = (time.monotonic() - begin) / len(photos)
    answers = {}
    for (i, row, photo, reading), faces in zip(photos, found, strict=True):
        begin = time.monotonic()
        try:
            rows = _faces(row, photo, faces, config)
        except (FaceError, GeometryError) as error:
            reason = str(error) if isinstance(error, FaceError) else f"GEOMETRY: {error}"
            answers[i] = [_failed(row, reason, weights, reading + detecting)]
            continue
        seconds = (reading + detecting + time.monotonic() - begin) / len(rows)
        answers[i] = [r | {"weights": weights, "seconds": seconds} for r in rows]
    return answers


def _faces(row: Row, photo: Photo, faces: list[Face], config: Config) -> list[Row]:
    common = {
        "key": row["key"],
        "photo_id": row["photo_id"],
        "content": row["content"],
        "format": photo.format,
        "width": photo.width,
        "height": photo.height,
    }
    if not faces:
        return [
            common
            | {
                "face_id": None,
                "status": NO_FACE,
                "reason": "NO_FACE: no face was found",
                "failed_stage": "align",
                "seed": row["seed"],
            }
        ]
    if len(faces) > config.align.max_faces:
        raise FaceError("TOO_MANY_FACES", f"{len(faces)} faces, align.max_faces is {config.align.max_faces}")
    landmarks = torch.from_numpy(np.stack([face.landmarks for face in faces])).double()
    quads = ffhq_quads(landmarks)
    crops = align_crops(photo.pixels, quads, config.crop_size)
    out = []
    for index, face in enumerate(faces):
        name = face_id(row["photo_id"], index)
        out.append(
            common
            | {
                "face_id": name,
                "status": OK,
                "seed": row_seed(config.seed, name),
                "face_index": index,
                "box": face.box.astype(np.float32),
                "landmarks": face.landmarks.astype(np.float32).reshape(-1),
                "quad": quads[index].numpy().astype(np.float64).reshape(-1),
                "score": face.score,
                "crop": encode_png(crops[index]),
            }
        )
    return out
