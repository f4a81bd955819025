"""Stage ``publish``: paste the protected faces back, save the photo, read it back, and judge it."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pyarrow as pa
import torch

from cluster import Operator
from pipelines.archive.output import write_output
from pipelines.archive.paths import SourceError
from pipelines.archive.reading import read_bytes
from pipelines.config.names import RECOGNISERS
from pipelines.config.sections import Config
from pipelines.networks import load as networks
from pipelines.photos.codec import decode
from pipelines.photos.photo import Photo, PhotoError
from pipelines.run.schemas import ERROR, NO_FACE, OK, WEAK
from pipelines.stages.crops import decode_png, geometry_in_crop
from pipelines.stages.judging import Place, bars_of, look, reason_of_weakness
from pipelines.stages.reading import Reader
from pipelines.stages.rows import Row, base_row, failed, iterate, reason_of, to_table
from pipelines.stages.saving import Pasting, limits_of
from scol_ops.alignment import align_crops
from scol_ops.distortions import NONE
from scol_ops.metrics import flip, psnr, ssim, to_uint8
from scol_ops.paste import face_mask
from scol_ops.strengthening import Seen

_JPEG = "jpeg75+half"  # of the column `ism_jpeg`, whatever `publish.distortions` says


def operator(config: Config, weights: str, out: str) -> Operator:
    """Loads the recognisers; the result takes all rows of one photo."""
    networks.set_up()
    device = torch.device("cpu")
    names = dict.fromkeys((*RECOGNISERS, config.publish.judge))
    recognisers = {name: networks.recogniser(name, device, config.engine.models) for name in names}
    judge = recognisers[config.publish.judge]
    bars = bars_of(config, judge)
    limits = limits_of(config)
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
        pasting = Pasting(reader.read(rows[0]["source.url"]), rows, config)
        photo = pasting.photo
        # A face that was not strengthened is as the attack left it.
        data = pasting.file(torch.cat([decode_png(row["protected"] or row["attack.protected"]) for row in rows]))
        done = _written(rows[0], data, "protected", "; ".join(photo.notes) or None)
        # What counts is what anybody will read: the file, not the pixels that were meant.
        return photo, decode(read_bytes(done["out_path"], 2 * limits.max_bytes), limits), done

    def _judge(row: Row, photo: Photo, saved: Photo) -> Row:
        size = config.crop_size
        place = Place(row, photo.width, photo.height)
        one, two = place.of(photo), place.of(saved)
        quad = torch.from_numpy(np.array(row["align.quad"]).reshape(1, 4, 2))
        before, after = (to_uint8(align_crops(p.pixels, quad, size)[0]) for p in (photo, saved))
        landmarks, _ = geometry_in_crop(row, size, device, "align.")
        face = face_mask(landmarks, size)[0, 0].numpy() > 0.5
        others = {name: network for name, network in recognisers.items() if network is not judge}
        own = one.embed(judge)
        seen = look(judge, own, two, (_JPEG, *config.publish.distortions))
        counted = Seen({name: seen.cosines[name] for name in (NONE, *config.publish.distortions)})
        found: Row = {
            "psnr": psnr(before, after),
            "ssim": ssim(before, after),
            "flip": flip(before, after, face),
            "face_psnr": psnr(before, after, face),
            "judge": judge.name,
            "ism": seen.saved,
            "ism_jpeg": seen.cosines[_JPEG],
            "ism_worst": counted.cosines[counted.worst],
            "worst": counted.worst,
            "distorted": [{"name": n, "ism": c} for n, c in counted.cosines.items() if n != NONE],
            "max_ism": bars.saved,
            "max_ism_distorted": bars.distorted if config.publish.judge_distorted else None,
            f"ism_{judge.name}": seen.saved,
        }
        for name, network in others.items():
            found[f"ism_{name}"] = look(network, one.embed(network), two, ()).saved
        reason = reason_of_weakness(judge.name, counted, bars, config.publish.judge_distorted)
        if reason is None and found["psnr"] < config.publish.min_psnr:
            reason = f"WEAK_QUALITY: {found['psnr']:.1f} dB over the face crop, below {config.publish.min_psnr:.1f}"
        if reason is None:
            return found | {"status": OK}
        return found | {"status": WEAK, "reason": reason, "failed_stage": "publish"}

    run.ahead = ahead
    return run
