"""Stage ``publish``: paste the protected faces back, save the photo, read it back, and judge it."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pyarrow as pa
import torch

from cluster import Operator, Stage
from pipelines.archive.output import write_output
from pipelines.archive.paths import SourceError
from pipelines.archive.reading import read_bytes
from pipelines.config.names import RECOGNISERS
from pipelines.config.sections import Config
from pipelines.networks.load import Networks
from pipelines.photos.codec import decode
from pipelines.photos.photo import Photo, PhotoError
from pipelines.run.schemas import ERROR, NO_FACE, OK, WEAK
from pipelines.stages.crops import decode_png, geometry_in_crop
from pipelines.stages.declaration import GEOMETRY, Setting, declared
from pipelines.stages.judging import Place, bars_of, look, reason_of_weakness
from pipelines.stages.reading import Reader
from pipelines.stages.rows import Row, base_row, failed, iterate, reason_of, to_table
from pipelines.stages.saving import Pasting, limits_of, read_unchanged
from scol_ops.alignment import align_crops
from scol_ops.distortions import NONE
from scol_ops.metrics import flip, psnr, ssim, to_uint8
from scol_ops.paste import face_mask
from scol_ops.strengthening import Seen
from scol_ops.visibility import face_jod

_JPEG = "jpeg75+half"  # of the column `ism_jpeg`, whatever `publish.distortions` says


def stage(setting: Setting) -> Stage:
    """Reads the last picture of each face, and the photo."""
    config = setting.config
    joins = {"source": ["path", "url"], "align": ["content", "crop", *GEOMETRY, "width", "height"]}
    if config.has_stage("strengthen"):
        joins["attack"] = ["protected"]
    limit = config.engine.face_seconds
    return declared(
        "publish", setting, setting.out, pool="photos", columns=["protected"], joins=joins, item_seconds=limit
    )


def operator(config: Config, weights: str, out: str) -> Operator:
    """Loads the recognisers; the result takes all rows of one photo."""
    return _Publisher(config, weights, out)


class _Publisher:
    """The operator: all rows of one photo -> rows."""

    def __init__(self, config: Config, weights: str, out: str) -> None:
        self.config, self.weights, self.out = config, weights, out
        networks = Networks(config, torch.device("cpu"))
        self.judge = networks.judge
        others = [name for name in RECOGNISERS if name != config.publish.judge]
        self.others = {name: networks.recogniser(name) for name in others}
        self.bars = bars_of(config, self.judge)
        self.limits = limits_of(config)
        self.reader = Reader(self.limits.max_bytes)

    def ahead(self, table: pa.Table) -> None:
        # a photo has a row for each of its faces
        self.reader.ahead([(url, None) for url in dict.fromkeys(table["source.url"].to_pylist())])

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = list(iterate(table))
        begin = time.monotonic()
        answers = self._publish(rows)
        seconds = (time.monotonic() - begin) / len(rows)
        return to_table(
            "publish",
            [
                {"path": row["source.path"], "action": "none"} | answer | {"weights": self.weights, "seconds": seconds}
                for row, answer in zip(rows, answers, strict=True)
            ],
        )

    def _publish(self, rows: list[Row]) -> list[Row]:
        if any(row["status"] == ERROR for row in rows):
            return self._give_up(rows)
        try:
            data = read_unchanged(self.reader, rows[0])
            if all(row["status"] == NO_FACE for row in rows):
                done = self._written(rows[0], data, "copied", None)
                return [base_row(row, self.weights) | done for row in rows]
            photo, saved, done = self._save(data, rows)
        except (SourceError, PhotoError, OSError) as error:
            return [failed(row, "publish", reason_of(error)) for row in rows]
        return [base_row(row, self.weights) | done | self._judged(row, photo, saved) for row in rows]

    def _give_up(self, rows: list[Row]) -> list[Row]:
        """A photo with a failed face is not published as protected."""
        done: Row = {}
        note = ""
        if self.config.publish.on_fail == "copy":
            try:
                done = self._written(rows[0], read_unchanged(self.reader, rows[0]), "copied", None)
                note = "; copied unprotected"
            except (SourceError, OSError) as error:
                note = f"; could not be copied either ({error})"
        bad = next(row for row in rows if row["status"] == ERROR)
        other = f"{bad['face_id'] or 'the photo'} failed at {bad['failed_stage']}"
        answers = []
        for row in rows:
            answer = base_row(row, self.weights) | done
            if row["status"] == ERROR:
                answer["reason"] = (row["reason"] or "") + note
            else:
                answer |= {"status": ERROR, "failed_stage": "publish", "reason": f"NOT_PUBLISHED: {other}{note}"}
            answers.append(answer)
        return answers

    def _written(self, row: Row, data: bytes, action: str, notes: str | None) -> Row:
        where = write_output(self.out, row["source.path"], data)
        return {
            "action": action,
            "out_path": where,
            "out_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "notes": notes,
        }

    def _save(self, data: bytes, rows: list[Row]) -> tuple[Photo, Photo, Row]:
        """The photo as it was and as it was saved, and the columns about the file."""
        pasting = Pasting(data, rows, self.config)
        photo = pasting.photo
        # A face that was not strengthened is as the attack left it.
        pictures = [decode_png(row["protected"] or row["attack.protected"]) for row in rows]
        notes = "; ".join(photo.notes) or None
        done = self._written(rows[0], pasting.file(torch.cat(pictures)), "protected", notes)
        # What counts is what anybody will read: the file, not the pixels that were meant.
        return photo, decode(read_bytes(done["out_path"], 2 * self.limits.max_bytes), self.limits), done

    def _judged(self, row: Row, photo: Photo, saved: Photo) -> Row:
        """A face's measures and verdict."""
        publish, judge = self.config.publish, self.judge.name
        place = Place(row, photo.width, photo.height)
        one, two = place.of(photo), place.of(saved)
        seen = look(self.judge, one.embed(self.judge), two, (_JPEG, *publish.distortions))
        counted = Seen({name: seen.cosines[name] for name in (NONE, *publish.distortions)})
        found: Row = self._measured(row, photo, saved) | {
            "judge": judge,
            "ism": seen.saved,
            "ism_jpeg": seen.cosines[_JPEG],
            "ism_worst": counted.cosines[counted.worst],
            "worst": counted.worst,
            "distorted": [{"name": n, "ism": c} for n, c in counted.cosines.items() if n != NONE],
            "max_ism": self.bars.saved,
            "max_ism_distorted": self.bars.distorted if publish.judge_distorted else None,
            f"ism_{judge}": seen.saved,
        }
        for name, network in self.others.items():
            found[f"ism_{name}"] = look(network, one.embed(network), two, ()).saved
        reason = reason_of_weakness(judge, counted, self.bars, publish.judge_distorted)
        if reason is None and found["jod"] is not None and found["jod"] < publish.min_jod:
            reason = f"WEAK_LOOK: JOD {found['jod']:.2f} of the face window, below {publish.min_jod:g}"
        if reason is None and found["psnr"] < publish.min_psnr:
            reason = f"WEAK_QUALITY: {found['psnr']:.1f} dB over the face crop, below {publish.min_psnr:.1f}"
        if reason is None:
            return found | {"status": OK}
        return found | {"status": WEAK, "reason": reason, "failed_stage": "publish"}

    def _measured(self, row: Row, photo: Photo, saved: Photo) -> Row:
        """What changed in a face's crop, and what of it a viewer of the photo sees."""
        size = self.config.crop_size
        quad = torch.from_numpy(np.array(row["align.quad"]).reshape(1, 4, 2))
        before, after = (to_uint8(align_crops(p.pixels, quad, size)[0]) for p in (photo, saved))
        landmarks, _ = geometry_in_crop(row, size, torch.device("cpu"), "align.")
        face = face_mask(landmarks, size)[0, 0].numpy() > 0.5
        return {
            "psnr": psnr(before, after),
            "ssim": ssim(before, after),
            "flip": flip(before, after, face),
            "face_psnr": psnr(before, after, face),
            "face_ssim": ssim(before, after, face),
            **face_jod(photo.pixels, saved.pixels, row["align.quad"]),
        }
