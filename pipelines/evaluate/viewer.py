"""A test with eyes: one page of pairs of face windows for viewers who do not know which of the two is the original.

What a measure calls small a person may see at a glance, so people are asked: which one is the original, how much does
it disturb (ITU-R BT.500-15, five-grade impairment scale), and would you publish it.  Order and place are drawn; a share
of the pairs shows the unaltered photo twice, which tells how often viewers see a change where there is none.  What is
shown are the photo's own pixels, cut on pixel boundaries and never resampled.

    OUT/viewer.html        for viewers; it tells neither names nor which is which
    OUT/viewer-key.json    what was where; not for viewers
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image

from pipelines.archive.paths import SourceError
from pipelines.archive.reading import digest_of, read_bytes
from pipelines.evaluate.errors import EvaluateError
from pipelines.evaluate.pairs import OK
from pipelines.photos.codec import decode
from pipelines.photos.photo import PhotoError
from pipelines.report import html
from pipelines.report.pictures import Pixels, encoded
from pipelines.report.windows import windows_of
from pipelines.run.folder import Run
from pipelines.run.text import utc
from scol_ops.alignment import ffhq_quads
from scol_ops.warp import GeometryError

VERSION = 1  # of the key and of the answers
PAGE, KEY = "viewer.html", "viewer-key.json"
LEFT, RIGHT, BOTH = "left", "right", "both"  # where the original stands
MOST_PAIRS, MOST_UNALTERED = 200, 0.9
WINDOW = 0.8  # side of what is shown, as a share of the FFHQ crop's: the whole head
_SPARE = 4  # candidates a pair: photos may have gone, faces may be unchanged
_COLUMNS = ("face_id", "person_id", "status", "same_size", "same_bytes", "url", "protected_url", "landmarks")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Draw:
    """What is drawn for the page.

    Attributes:
        pairs: most pairs, 1 to 200.
        unaltered: share of them that shows the original twice, 0 to 0.9.

    Raises:
        EvaluateError: BAD_SETTING.
    """

    pairs: int = 40
    unaltered: float = 0.25

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= MOST_PAIRS:
            raise EvaluateError("BAD_SETTING", f"{self.pairs} pairs for viewers; 1 to {MOST_PAIRS} are possible")
        if not 0 <= self.unaltered <= MOST_UNALTERED:  # NaN is refused, too
            raise EvaluateError("BAD_SETTING", f"a share of {self.unaltered} unaltered pairs; 0 to 0.9 is possible")


@dataclass(frozen=True, eq=False)
class Shown:
    """A face that can be shown.

    Attributes:
        row: its row of `faces.parquet`.
        original, protected: its windows, uint8 (H, W, 3), of one shape and never equal.
        digest: of the protected file's bytes, see `archive.reading.digest_of`.
    """

    row: Mapping[str, Any]
    original: Pixels
    protected: Pixels
    digest: str


def _hash(*fields: object, size: int = 8) -> str:
    return hashlib.blake2b("\0".join(map(str, fields)).encode(), digest_size=size).hexdigest()


# ---- windows ---------------------------------------------------------------------------------------------------------


def read_face(row: Mapping[str, Any]) -> Shown | None:
    """A face's two windows; None where a photo has gone, or the face is the same in both or lies beside the photo."""
    try:
        data = read_bytes(row["protected_url"])
        one, two = decode(read_bytes(row["url"])).pixels, decode(data).pixels
        quad = ffhq_quads(torch.tensor(row["landmarks"], dtype=torch.float64).reshape(1, 5, 2))[0]
    except (SourceError, PhotoError, GeometryError):
        return None
    both = windows_of(one, two, quad.numpy(), WINDOW)
    if both is None or np.array_equal(*both):
        return None
    return Shown(row, *both, digest_of(data))


def side_by_side(left: Pixels, right: Pixels) -> str:
    """Two windows of one shape as ONE lossless PNG in a data URL: neither has a size or an encoding of its own that
    tells which it is, and a pair of equal ones is made no differently."""
    return encoded(Image.fromarray(np.concatenate([left, right], 1)), "PNG")


# ---- drawing ---------------------------------------------------------------------------------------------------------


def candidates(run: Run, seed: int, most: int) -> list[dict[str, Any]]:
    """Rows of `most` faces at most whose photo was saved in its own size, in an order drawn by the seed."""

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for table in run.read_tables("faces.parquet", _COLUMNS):
            well = pc.and_(pc.equal(table["status"], OK), pc.and_(table["same_size"], pc.invert(table["same_bytes"])))
            for row in table.filter(pc.fill_null(well, False)).to_pylist():
                yield _hash("viewer", seed, row["face_id"]), row

    return [row for _, row in heapq.nsmallest(most, rows(), key=lambda pair: pair[0])]


def arrange(count: int, unaltered: float, seed: int) -> list[str]:
    """Where the original stands in each pair, in the order in which they are shown.

    Of the altered pairs half have it on the left and half on the right; an odd one is drawn. With a share of unaltered
    pairs above 0 there is at least one of each kind, if there are two pairs.
    """
    rng = np.random.default_rng(int(_hash("places", seed, count), 16))
    controls = min(max(1, round(unaltered * count)), count - 1) if unaltered > 0 else 0
    altered = count - controls
    places = [LEFT, RIGHT] * (altered // 2) + [LEFT if rng.random() < 0.5 else RIGHT] * (altered % 2)
    places += [BOTH] * controls
    return [places[i] for i in rng.permutation(count)]


def write_viewer(run: Run, draw: Draw, seed: int, say: Say = lambda text: None) -> dict[str, Any]:
    """Write `viewer.html` and `viewer-key.json` beside an evaluation's `faces.parquet`.

    Args:
        run: the evaluation's folder. draw: how many pairs. seed: of the faces, their order and places.
        say: takes one line.

    Returns:
        the key: `version`, `page` (hash of all that is shown), `written`, `seed`, `pairs`: `id`, where the original
        stands (`left`, `right`, `both`), `face_id`, `person_id`, `url`, `protected_url`, `protected_digest`.

    Raises:
        EvaluateError: NO_FACES. RunError: the folder holds no evaluation.
    """
    faces: list[Shown] = []
    for row in candidates(run, seed, _SPARE * draw.pairs):
        face = read_face(row)
        if face is not None:
            faces.append(face)
        if len(faces) == draw.pairs:
            break
    if not faces:
        raise EvaluateError("NO_FACES", "no face can be shown to viewers: none was changed in a photo of the same size")
    pairs, shown, content = [], [], hashlib.blake2b(digest_size=8)
    for place, face in zip(arrange(len(faces), draw.unaltered, seed), faces, strict=True):
        left = face.protected if place == RIGHT else face.original
        right = face.protected if place == LEFT else face.original
        pair = {"id": _hash("pair", seed, face.row["face_id"], size=6), "original": place}
        content.update(json.dumps(pair).encode() + left.tobytes() + right.tobytes())
        names = ("face_id", "person_id", "url", "protected_url")
        pairs.append(pair | {name: face.row[name] for name in names} | {"protected_digest": face.digest})
        height, width = left.shape[:2]
        shown.append({"id": pair["id"], "width": width, "height": height, "picture": side_by_side(left, right)})
    key = {"version": VERSION, "page": content.hexdigest(), "written": utc(), "seed": seed, "pairs": pairs}
    page = html.render(
        "evaluate/viewer.html", "evaluate/viewer.css", "evaluate/viewer.js",
        version=VERSION, page=key["page"], pairs=shown,
    )  # fmt: skip
    run.write_json(KEY, key)
    run.write(PAGE, page.encode())
    controls = sum(pair["original"] == BOTH for pair in pairs)
    say(f"page for viewers: {len(pairs)} pairs, {controls} of them unaltered")
    return key
