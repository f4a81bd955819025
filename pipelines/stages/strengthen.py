"""Stage ``strengthen``: the closed loop.  The photo is made as it would be published, and the judge looks at its faces;
those that it still knows go back, are changed more, and are looked at again.

All faces of a photo go together, since they share a file.  The judge sees the very bytes that ``publish`` writes
(`saving`), decoded again; nothing of it enters a gradient.  It works on the CPU, as publish's does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cluster import ItemTimeout, Operator, Stage
from pipelines.archive.paths import SourceError
from pipelines.config.sections import Config
from pipelines.networks.load import Networks
from pipelines.photos.codec import decode
from pipelines.photos.photo import PhotoError
from pipelines.run.schemas import OK
from pipelines.stages.crops import decode_png, encode_png  # fmt: skip
from pipelines.stages.declaration import GEOMETRY, Setting, declared
from pipelines.stages.judging import Place, bars_of, look
from pipelines.stages.reading import Reader
from pipelines.stages.rows import Row, base_row, face_time, failed, iterate, raise_if_unfit, reason_of, to_table
from pipelines.stages.saving import Pasting, limits_of, read_unchanged
from pipelines.stages.treatments import Attacker, Refiner, settings_of
from scol_ops.attack import AttackSettings
from scol_ops.metrics import psnr, to_uint8
from scol_ops.refinement import RefineSettings
from scol_ops.strengthening import (
    Seen,
    StrengthenSettings,
    attack_of,
    best_round,
    faded,
    margins_of,
    refinement_of,
    unconfined,
)  # fmt: skip
from scol_ops.tuning import DeadlineExceeded

# Why a face's loop ended.
PASSED, ROUNDS, QUALITY, DIVERGED, TIME = "passed", "rounds", "quality", "diverged", "time"
_FADES = 8  # then a round that is still below is left out
_SEED = 0x5000  # apart from the seeds of tune, refine and attack, which are the face's own ^ 0, 1 and 2


@dataclass(eq=False)
class _Attempt:
    """A picture of a face.

    Attributes:
        number: its round; 0 is what the attack left.
        picture: (1, 3, S, S), rounded to 8 bits; `png` the same, None of round 0.
        psnr: dB over the crop.
        seen: by the judge, in the latest file that had it; None before.
    """

    number: int
    picture: Tensor
    png: bytes | None
    psnr: float
    seen: Seen | None = None


@dataclass(eq=False)
class _Face:
    """A face in the loop.

    Attributes:
        original: (1, 3, S, S), its crop; `mask`: (1, 1, S, S); `own`: (1, D), by the judge; `place`: in the photo.
        tried: the pictures, by round.
        shown: the one in the latest file; `pixels`: of the file's window.
        rounds: begun so far.
        ended: why it goes on no more, before its rounds are used up.
        seconds: spent on it, with its share of what its photo took.
    """

    row: Row
    original: Tensor
    mask: Tensor
    own: Tensor
    place: Place
    tried: list[_Attempt]
    shown: _Attempt | None = None
    pixels: np.ndarray | None = None
    rounds: int = 0
    ended: str | None = None
    error: str | None = None
    seconds: float = 0.0

    def attempt(self, number: int, png: bytes) -> _Attempt:
        picture = decode_png(png)
        quality = psnr(to_uint8(self.original[0]), to_uint8(picture[0]))
        return _Attempt(number, picture, png if number else None, quality)


def stage(setting: Setting) -> Stage:
    """Reads the pictures of ``attack`` and the photo. Each face has its own time limit."""
    config = setting.config
    joins = {"source": ["url"], "align": ["content", "crop", *GEOMETRY, "width", "height"]}
    if config.attack.enabled:
        joins |= {"invert": ["code"], "fuse": ["target"]}
    if config.refine.id_lock:
        joins["fuse"] = [*joins.get("fuse", []), "fused"]
    return declared(
        "strengthen",
        setting,
        setting.std,
        pool="generator",
        columns=["protected"],
        joins=joins,
        shard_items=setting.slow_shard,
    )


def operator(config: Config, weights: str, std: np.ndarray | None) -> Operator:
    """Loads the networks; the result takes all rows of one photo, of ``attack`` with joined columns."""
    return _Loop(config, weights, std)


class _Loop:
    """The operator: rows of one photo -> rows."""

    def __init__(self, config: Config, weights: str, std: np.ndarray | None) -> None:
        self.config, self.weights = config, weights
        networks = Networks(config)
        self.device = networks.device
        self.judge = Networks(config, torch.device("cpu")).judge
        self.bars = bars_of(config, self.judge)
        self.settings = settings_of(StrengthenSettings, config.strengthen)
        self.refining = settings_of(RefineSettings, config.refine)
        self.refiner = Refiner(config, networks) if config.refines_again else None
        self.attacking = settings_of(AttackSettings, config.attack)
        self.attacker = Attacker(config, std, networks) if config.attack.enabled else None
        self.limit = config.engine.face_seconds
        self.reader = Reader(limits_of(config).max_bytes)

    def ahead(self, table: pa.Table) -> None:
        self.reader.ahead([(url, None) for url in dict.fromkeys(table["source.url"].to_pylist())])

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = list(iterate(table))
        if any(row["status"] != OK for row in rows):  # no face, or a photo that will not be published
            return to_table("strengthen", [base_row(row, self.weights) for row in rows])
        begin = time.monotonic()
        try:
            faces = self._faces(rows)
        except (SourceError, PhotoError, ItemTimeout) as error:
            seconds = (time.monotonic() - begin) / len(rows)
            answers = [failed(row, "strengthen", reason_of(error), self.weights, seconds) for row in rows]
        else:
            answers = [self._answer(face, any(f.error for f in faces)) for face in faces]
        return to_table("strengthen", answers)

    def _faces(self, rows: Sequence[Row]) -> list[_Face]:
        """The loop of one photo."""
        faces: list[_Face] = []
        with self._photo_time(faces):
            pasting = Pasting(read_unchanged(self.reader, rows[0]), rows, self.config)
            for i, row in enumerate(rows):
                place = Place(row, pasting.photo.width, pasting.photo.height)
                own = place.of(pasting.photo).embed(self.judge)
                face = _Face(row, pasting.originals[i : i + 1], pasting.masks[i : i + 1], own, place, [])
                face.tried.append(face.attempt(0, row["protected"]))
                faces.append(face)
        self._show(pasting, faces, [face.tried[0] for face in faces])
        for number in range(1, self.settings.rounds + 1):
            going = [face for face in faces if face.ended is None and face.shown.seen.excess(self.bars) > 0]
            for face in going:
                self._strengthen(face, number)
                if face.error is not None:
                    return faces
            if any(face.tried[-1] is not face.shown for face in faces):
                self._show(pasting, faces, [face.tried[-1] for face in faces])
        best = [face.tried[best_round([a.seen for a in face.tried], self.bars)] for face in faces]
        if any(attempt is not face.shown for face, attempt in zip(faces, best, strict=True)):
            self._show(pasting, faces, best)
        return faces

    @contextmanager
    def _photo_time(self, faces: list[_Face]) -> Iterator[None]:
        """What all faces wait for together; each has its share of the time."""
        begin = time.monotonic()
        with face_time(self.limit, self.limit):
            yield
        for face in faces:
            face.seconds += (time.monotonic() - begin) / len(faces)

    def _show(self, pasting: Pasting, faces: list[_Face], attempts: Sequence[_Attempt]) -> None:
        """Make the photo's file with these pictures, one a face, and have the judge look at it."""
        with self._photo_time(faces):
            data = pasting.file(torch.cat([attempt.picture for attempt in attempts]))
            photo = decode(data, limits_of(self.config))
            for face, attempt in zip(faces, attempts, strict=True):
                window = face.place.of(photo)
                if attempt is not face.shown or not np.array_equal(window.pixels, face.pixels):
                    attempt.seen = look(self.judge, face.own, window, self.config.publish.distortions)
                face.shown, face.pixels = attempt, window.pixels

    def _strengthen(self, face: _Face, number: int) -> None:
        """A round of one face: another picture, or none and why."""
        if face.shown.psnr < self.settings.min_psnr:  # as it came: a stronger change would be below as well
            face.ended = QUALITY
            return
        begin, left = time.monotonic(), self.limit - face.seconds
        face.rounds = number
        try:
            if left <= 0:
                raise DeadlineExceeded(f"before round {number}")
            with face_time(left * 1.1, left):
                found = face.attempt(number, encode_png(self._stronger(face, number, begin + left)))
                if found.psnr < self.settings.min_psnr:
                    face.ended = QUALITY
                    found = self._faded(face, found)
        except FloatingPointError:  # the settings of this round are too strong for this face, wherever it is tried
            face.ended = DIVERGED
        except (DeadlineExceeded, ItemTimeout):  # what there is has been judged, and is published
            face.ended = TIME
        except Exception as error:
            raise_if_unfit(error)
            face.error = reason_of(error)
        else:
            if found.psnr >= self.settings.min_psnr:
                face.tried.append(found)
        face.seconds += time.monotonic() - begin

    def _faded(self, face: _Face, found: _Attempt) -> _Attempt:
        """So much of a change as the stated quality allows."""
        least, whole = self.settings.min_psnr, found
        aim = least
        for _ in range(_FADES):
            found = face.attempt(whole.number, encode_png(faded(whole.picture, face.original, whole.psnr, aim)))
            if found.psnr >= least:
                break
            aim += least - found.psnr + 0.01  # rounding to 8 bits undoes the fading of what changes by a few levels
        return found

    def _stronger(self, face: _Face, number: int, deadline: float) -> Tensor:
        """(1, 3, S, S): from the picture in the latest file on, by this round's settings."""
        row = face.row
        original, mask, picture = (t.to(self.device) for t in (face.original, face.mask, face.shown.picture))
        seed = (row["seed"] ^ _SEED) + 2 * number
        if self.refiner is not None:
            start, fused = unconfined(picture, original, mask), row.get("fuse.fused")
            margins = margins_of(self.settings, self.config.refine.margin_of_each(), number)
            refining = refinement_of(self.settings, self.refining, number)
            picture = self.refiner(row, fused, start, original, mask, margins, refining, seed, deadline).picture
        if self.attacker is not None:
            attacking = attack_of(self.settings, self.attacking, number)
            picture = self.attacker(row, picture, mask, attacking, seed + 1, deadline)[0].picture
        return picture

    def _answer(self, face: _Face, broken: bool) -> Row:
        if face.error is not None:
            return failed(face.row, "strengthen", face.error, self.weights, face.seconds)
        row = base_row(face.row, self.weights, face.seconds)
        if broken:  # another face failed, so the photo is not published
            return row
        first, last = face.tried[0], face.shown
        return row | {
            "protected": last.png,
            "rounds": face.rounds,
            "kept": last.number,
            "ended": PASSED if last.seen.excess(self.bars) <= 0 else face.ended or ROUNDS,
            "psnr": last.psnr,
            "psnr_before": first.psnr,
            "ism": last.seen.saved,
            "ism_worst": last.seen.cosines[last.seen.worst],
            "worst": last.seen.worst,
            "ism_before": first.seen.saved,
            "ism_worst_before": first.seen.cosines[first.seen.worst],
            "history": [
                {
                    "round": attempt.number,
                    "psnr": attempt.psnr,
                    "ism": attempt.seen.saved,
                    "ism_worst": attempt.seen.cosines[attempt.seen.worst],
                }
                for attempt in face.tried
            ],
        }
