"""Stage ``publish``: paste the protected faces back, save the photo, read it back, and judge it."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from cluster import Operator
from pipelines import models
from pipelines.config import RECOGNISERS, Config
from pipelines.manifests import ERROR, NO_FACE, OK, WEAK
from pipelines.photo import Limits, Photo, PhotoError, decode, encode
from pipelines.sources import SourceError, read_bytes, write_output
from pipelines.stages.common import (
    Row,
    base_row,
    decode_png,
    failed,
    geometry_in_crop,
    iterate,
    reason_of,
    to_table,
    to_tensor,
)
from pipelines.stages.reading import Reader
from scol_ops.alignment import align_crops
from scol_ops.metrics import flip, ism, psnr, ssim, to_uint8
from scol_ops.paste import face_mask, paste_back

_JPEG_QUALITY = 75


def operator(config: Config, weights: str, out: str) -> Operator:
    """Loads the recognisers; the result takes all rows of one photo."""
    models.set_up()
    device = torch.device("cpu")
    names = dict.fromkeys((*RECOGNISERS, config.publish.judge))
    networks = {name: models.recogniser(name, device, config.engine.models) for name in names}
    judge = networks[config.publish.judge]
    limit = judge.threshold if config.publish.max_ism is None else config.publish.max_ism
    limits = Limits(config.align.max_pixels, config.align.max_bytes)
    reader = Reader(limits.max_bytes)

    def ahead(table: pa.Table) -> None:
        # a photo has a row for each of its faces
        reader.ahead([(url, None) for url in dict.fromkeys(table["source.url"].to_pylist())])

    def run(table: pa.Table) -> pa.Table:
        rows = list(iterate(table))
        begin = time.monotonic()
        answers = _publish(rows)
        seconds = (time.monotonic() - begin) / len(rows)
        return to_table(
            "publish",
            [
                {"path": row["source.path"], "action": "none"} | answer | {"weights": weights, "seconds": seconds}
                for row, answer in zip(rows, answers, strict=True)
            ],
        )

    def _publish(rows: list[Row]) -> list[Row]:
        bad = [row for row in rows if row["status"] == ERROR]
        if bad:
            return _give_up(rows, bad)
        if all(row["status"] == NO_FACE for row in rows):
            try:
                done = _copy(rows[0])
            except (SourceError, OSError) as error:
                return [failed(row, "publish", reason_of(error)) for row in rows]
            return [base_row(row, weights) | done for row in rows]
        try:
            photo, saved, done = _save(rows)
        except (SourceError, PhotoError) as error:
            return [failed(row, "publish", reason_of(error)) for row in rows]
        return [base_row(row, weights) | done | _judge(row, photo, saved) for row in rows]

    def _give_up(rows: list[Row], bad: list[Row]) -> list[Row]:
        """A photo with a failed face is not published as protected."""
        done: Row = {}
        note = ""
        if config.publish.on_fail == "copy":
            try:
                done = _copy(rows[0])
                note = "; copied unprotected"
            except (SourceError, OSError) as error:
                note = f"; could not be copied either ({error})"
        answers = []
        for row in rows:
            answer = base_row(row, weights) | done
            if row["status"] == ERROR:
                answer["reason"] = (row["reason"] or "") + note
            else:
                other = f"{bad[0]['face_id'] or 'the photo'} failed at {bad[0]['failed_stage']}"
                answer |= {"status": ERROR, "failed_stage": "publish", "reason": f"NOT_PUBLISHED: {other}{note}"}
            answers.append(answer)
        return answers

    def _copy(row: Row) -> Row:
        data = reader.read(row["source.url"])
        return _written(row, data, "copied", None)

    def _written(row: Row, data: bytes, action: str, notes: str | None) -> Row:
        where = write_output(out, row["source.path"], data)
        return {
            "action": action,
            "out_path": where,
            "out_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "notes": notes,
        }

    def _save(rows: list[Row]) -> tuple[Photo, Photo, Row]:
        photo = decode(reader.read(rows[0]["source.url"]), limits)
        size = config.crop_size
        if (photo.width, photo.height) != (rows[0]["align.width"], rows[0]["align.height"]):
            raise SourceError("CHANGED", "the photo has changed since its faces were found")
        originals = torch.cat([decode_png(row["align.crop"]) for row in rows])
        protected = torch.cat([decode_png(row["protected"]) for row in rows])
        masks = torch.cat([face_mask(geometry_in_crop(row, size, device, "align.")[0], size) for row in rows])
        quads = torch.from_numpy(np.stack([np.array(row["align.quad"]).reshape(4, 2) for row in rows]))
        # Tuning, refinement and attack have confined the change to the mask already.
        pixels = paste_back(photo.pixels, originals, protected, masks, quads, masked=True)
        done = _written(rows[0], encode(photo, pixels), "protected", "; ".join(photo.notes) or None)
        # What counts is what anybody will read: the file, not the pixels that were meant.
        return photo, decode(read_bytes(done["out_path"], 2 * limits.max_bytes), limits), done

    def _judge(row: Row, photo: Photo, saved: Photo) -> Row:
        size = config.crop_size
        window = FaceWindow(row, photo.width, photo.height)
        one, two = (to_tensor(p.pixels[window.rows, window.columns]) for p in (photo, saved))
        quad = torch.from_numpy(np.array(row["align.quad"]).reshape(1, 4, 2))
        before, after = (to_uint8(align_crops(p.pixels, quad, size)[0]) for p in (photo, saved))
        landmarks, _ = geometry_in_crop(row, size, device, "align.")
        face = face_mask(landmarks, size)[0, 0].numpy() > 0.5
        found: Row = {
            "psnr": psnr(before, after),
            "ssim": ssim(before, after),
            "flip": flip(before, after, face),
            "face_psnr": psnr(before, after, face),
            "judge": judge.name,
            "max_ism": limit,
        }
        with torch.no_grad():
            for name, network in networks.items():
                own = network.embed_photo(one, window.landmarks, window.box)
                found[f"ism_{name}"] = float(ism(own, network.embed_photo(two, window.landmarks, window.box))[0])
            own = judge.embed_photo(one, window.landmarks, window.box)
            small, landmarks, box = half_jpeg(saved.pixels[window.rows, window.columns], window)
            found["ism_jpeg"] = float(ism(own, judge.embed_photo(small, landmarks, box))[0])
        found["ism"] = found[f"ism_{judge.name}"]
        if found["ism"] > limit:
            reason = f"WEAK_IDENTITY: {judge.name} sees cosine {found['ism']:.3f} to the original, above {limit:.3f}"
        elif found["psnr"] < config.publish.min_psnr:
            reason = f"WEAK_QUALITY: {found['psnr']:.1f} dB over the face crop, below {config.publish.min_psnr:.1f}"
        else:
            return found | {"status": OK}
        return found | {"status": WEAK, "reason": reason, "failed_stage": "publish"}

    run.ahead = ahead
    return run


class FaceWindow:
    """The part of a photo about a face, so that a large photo is not made a float tensor as a whole.

    Attributes:
        rows, columns: slices of the photo: all that the recognisers' alignments sample, unless the photo ends there.
        landmarks, box: (1, 5, 2) and (1, 4) in the window's pixels.
    """

    def __init__(self, row: Mapping[str, Any], width: int, height: int) -> None:
        quad = np.array(row["align.quad"], np.float64).reshape(4, 2)
        box = np.array(row["align.box"], np.float64).reshape(2, 2)
        points = np.concatenate([quad, box])
        low, high = points.min(0), points.max(0)
        margin = 0.25 * (high - low).max() + 2
        left, top = (max(0, int(v)) for v in np.floor(low - margin))
        right, bottom = (int(v) for v in np.ceil(high + margin))
        self.rows, self.columns = slice(top, min(height, bottom + 1)), slice(left, min(width, right + 1))
        shift = np.array([left, top])
        landmarks = np.array(row["align.landmarks"], np.float64).reshape(1, 5, 2) - shift
        self.landmarks = torch.from_numpy(landmarks).float()
        self.box = torch.from_numpy((box - shift).reshape(1, 4)).float()


def half_jpeg(pixels: np.ndarray, window: FaceWindow) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A window at half size and through JPEG, as a messenger would send it: picture, landmarks, box."""
    height, width = (max(1, n // 2) for n in pixels.shape[:2])
    image = Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    buffer.seek(0)
    with Image.open(buffer, formats=("JPEG",)) as again:
        picture = to_tensor(np.asarray(again.convert("RGB")))
    scale = torch.tensor([width / pixels.shape[1], height / pixels.shape[0]])
    landmarks = (window.landmarks + 0.5) * scale - 0.5
    box = (window.box + 0.5) * scale.repeat(2) - 0.5
    return picture, landmarks, box
