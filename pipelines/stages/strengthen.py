"""Stage ``strengthen``: the closed loop.  The photo is made as it would be published, and looked at; each face gets the
smallest change at which the judge does not know it, and none that shows more than it may (``scol_ops.strengthening``).

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
from scol_ops.strengthening import Bars, Look, Search, Seen, StrengthenSettings, faded, refinement_of, unconfined
from scol_ops.tuning import DeadlineExceeded
from scol_ops.visibility import DISPLAYS, face_jod

# Why a face's loop ended.
PASSED, ROUNDS, SIGHT, DIVERGED, TIME = "passed", "rounds", "sight", "diverged", "time"
_SEED = 0x5000  # apart from the seeds of tune, refine and attack, which are the face's own ^ 0, 1 and 2


@dataclass(eq=False)
class _Attempt:
    """A picture of a face: a share of a round's change.

    Attributes:
        number: its round; 0 is what the attack left.
        share: of the round's change.
        picture: (1, 3, S, S), rounded to 8 bits; `png` the same, None of the whole of round 0.
        psnr: dB over the crop.
        seen, jod: by the judge, and by eye, in the latest file that had it; None before.
    """

    number: int
    share: float
    picture: Tensor
    png: bytes | None
    psnr: float
    seen: Seen | None = None
    jod: float | None = None


def _attempt(original: Tensor, number: int, png: bytes, share: float = 1.0) -> _Attempt:
    """A picture of the face whose crop is ``original``, (1, 3, S, S); other arguments as of ``_Attempt``."""
    picture = decode_png(png)
    quality = psnr(to_uint8(original[0]), to_uint8(picture[0]))
    return _Attempt(number, share, picture, png if number or share < 1 else None, quality)


@dataclass(eq=False)
class _Face:
    """A face in the loop.

    Attributes:
        original: (1, 3, S, S), its crop; `mask`: (1, 1, S, S); `own`: (1, D), by the judge; `place`: in the photo.
        tried: the pictures, in their order.
        whole: the latest round's picture, of which shares are tried; `search`: among these.
        kept: the best of the rounds before.
        shown: the one in the latest file; `pixels`: of the file's window.
        rounds: begun so far.
        ended: why no further round is begun, before they are used up.
        seconds: spent on it, with its share of what its photo took.
    """

    row: Row
    original: Tensor
    mask: Tensor
    own: Tensor
    place: Place
    tried: list[_Attempt]
    whole: _Attempt
    search: Search
    kept: _Attempt | None = None
    shown: _Attempt | None = None
    pixels: np.ndarray | None = None
    rounds: int = 0
    ended: str | None = None
    error: str | None = None
    seconds: float = 0.0

    def share(self, share: float) -> _Attempt:
        """A share of the latest round's change."""
        if share == 1:
            return self.whole
        png = encode_png(faded(self.whole.picture, self.original, share))
        return _attempt(self.original, self.whole.number, png, share)

    def best(self, bars: Bars) -> _Attempt:
        """What to publish: what the latest round's search found, unless one before was nearer to the bars.

        Rounds go on only while nothing hides, so those before do not hide, and may be seen.
        """
        index = self.search.found
        found, look = self.tried[index - len(self.search.looks)], self.search.looks[index]
        if self.kept is None or (look.hidden and look.unseen):
            return found
        nearer = look.unseen and found.seen.excess(bars) < self.kept.seen.excess(bars)
        return found if nearer else self.kept

    @property
    def known(self) -> bool:
        """The latest round's whole change does not hide it, and shows less than it may."""
        return not any(look.hidden for look in self.search.looks) and all(look.unseen for look in self.search.looks)


def stage(setting: Setting) -> Stage:
    """Reads the pictures of ``attack`` and the photo. Each face has its own time limit."""
    config = setting.config
    joins = {"source": ["url"], "align": ["content", "crop", *GEOMETRY, "width", "height"]}
    if config.attacks_again:
        joins |= {"invert": ["code"], "fuse": ["target"]}
    if config.refines_again and config.refine.id_lock:
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
        self.bars, self.min_jod = bars_of(config, self.judge), config.publish.min_jod
        self.settings = settings_of(StrengthenSettings, config.strengthen)
        self.refining = settings_of(RefineSettings, config.refine)
        self.refiner = Refiner(config, networks) if config.refines_again else None
        self.attacking = settings_of(AttackSettings, config.attack)
        self.attacker = Attacker(config, std, networks) if config.attacks_again else None
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
                own, original = place.of(pasting.photo).embed(self.judge), pasting.originals[i : i + 1]
                first, search = _attempt(original, 0, row["protected"]), Search(self.settings.looks)
                faces.append(_Face(row, original, pasting.masks[i : i + 1], own, place, [], first, search))
        for number in range(self.settings.rounds + 1):
            going = [face for face in faces if face.ended is None and (number == 0 or face.known)]
            for face in going if number else ():
                self._strengthen(face, number)
                if face.error is not None:
                    return faces
            self._search(pasting, faces, [face for face in going if face.ended is None])
        best = [face.best(self.bars) for face in faces]
        if any(attempt is not face.shown for face, attempt in zip(faces, best, strict=True)):
            self._show(pasting, faces, best)
        return faces

    def _search(self, pasting: Pasting, faces: list[_Face], going: Sequence[_Face]) -> None:
        """Find the share of their latest round's change that these faces keep; the others stay as they are shown."""
        while asked := {face: share for face in going if (share := face.search.next()) is not None}:
            going = list(asked)
            with self._photo_time(going):
                for face, share in asked.items():
                    face.tried.append(face.share(share))
            self._show(pasting, faces, [face.tried[-1] if face in asked else face.shown for face in faces])
            for face in going:
                face.search.told(self._judged(face.tried[-1]))

    def _judged(self, attempt: _Attempt) -> Look:
        """Whether a picture that was looked at meets the two bars."""
        unseen = attempt.jod is None or attempt.jod >= self.min_jod
        return Look(attempt.share, attempt.seen.excess(self.bars) <= 0, unseen)

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
                    quad = face.row["align.quad"]
                    attempt.jod = face_jod(pasting.photo.pixels, photo.pixels, quad, DISPLAYS[:1])["jod"]
                face.shown, face.pixels = attempt, window.pixels

    def _strengthen(self, face: _Face, number: int) -> None:
        """A round of one face: a stronger change to search in, or none and why."""
        begin, left = time.monotonic(), self.limit - face.seconds
        face.rounds = number
        try:
            if left <= 0:
                raise DeadlineExceeded(f"before round {number}")
            with face_time(left * 1.1, left):
                whole = _attempt(face.original, number, encode_png(self._stronger(face, number, begin + left)))
                face.kept, face.whole, face.search = face.best(self.bars), whole, Search(self.settings.looks)
        except FloatingPointError:  # the settings of this round are too strong for this face, wherever it is tried
            face.ended = DIVERGED
        except (DeadlineExceeded, ItemTimeout):  # what there is has been judged, and is published
            face.ended = TIME
        except Exception as error:
            raise_if_unfit(error)
            face.error = reason_of(error)
        face.seconds += time.monotonic() - begin

    def _stronger(self, face: _Face, number: int, deadline: float) -> Tensor:
        """(1, 3, S, S): from the latest round's picture on, by this round's settings."""
        row = face.row
        original, mask, picture = (t.to(self.device) for t in (face.original, face.mask, face.whole.picture))
        seed = (row["seed"] ^ _SEED) + 2 * number
        if self.refiner is not None:
            start, fused = unconfined(picture, original, mask), row.get("fuse.fused")
            margins = self.config.refine.margin_of_each()
            refining = refinement_of(self.settings, self.refining, number)
            picture = self.refiner(row, fused, start, original, mask, margins, refining, seed, deadline).picture
        if self.attacker is not None:
            picture = self.attacker(row, picture, mask, self.attacking, seed + 1, deadline)[0].picture
        return picture

    def _answer(self, face: _Face, broken: bool) -> Row:
        if face.error is not None:
            return failed(face.row, "strengthen", face.error, self.weights, face.seconds)
        row = base_row(face.row, self.weights, face.seconds)
        if broken:  # another face failed, so the photo is not published
            return row
        first, last = face.tried[0], face.shown
        judged = self._judged(last)
        return row | {
            "protected": last.png,
            "rounds": face.rounds,
            "kept": last.number,
            "share": last.share,
            "ended": PASSED if judged.hidden and judged.unseen else face.ended or (ROUNDS if face.known else SIGHT),
            "psnr": last.psnr,
            "psnr_before": first.psnr,
            "jod": last.jod,
            "jod_before": first.jod,
            "ism": last.seen.saved,
            "ism_worst": last.seen.cosines[last.seen.worst],
            "worst": last.seen.worst,
            "ism_before": first.seen.saved,
            "ism_worst_before": first.seen.cosines[first.seen.worst],
            "looks": [
                {
                    "round": attempt.number,
                    "share": attempt.share,
                    "psnr": attempt.psnr,
                    "jod": attempt.jod,
                    "ism": attempt.seen.saved,
                    "ism_worst": attempt.seen.cosines[attempt.seen.worst],
                }
                for attempt in face.tried
            ],
        }
