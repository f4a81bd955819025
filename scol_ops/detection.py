"""Face detection: MTCNN's three networks under a batched pipeline of our own.

Method: Zhang et al., "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional Networks", IEEE Signal
Processing Letters 23(10), 2016.  Networks' layers and weights: facenet-pytorch 2.6.0 (github.com/timesler/
facenet-pytorch, MIT), read from that package without running any of its code.

What differs from that package's loop, and why (measured on 250 px and 1000 px photos, see pipelines/bench/align):

- It resizes each pyramid level from the full photo by ``adaptive_avg_pool2d``, 43 % of its time on a 1000 px photo;
  here each level is made in 8-bit fixed point from the nearest halved copy.
- All levels lie side by side in one picture (a mosaic), and the proposal network runs over it in strips that stay in
  the cache, with pooling as two element-wise maxima: no indices, no page faults.
- Candidates of a photo are cut out by one ``grid_sample`` from the halved copy that suits their size, not one at a
  time.
- Boxes keep their fractions from the first stage on; nothing is truncated to whole pixels.
- Overlapping candidates are suppressed after their correction, which brings them together, and not before it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms

from scol_ops.models.files import WeightsError, read_checked

SHA256 = {
    "pnet.pt": "a2a71925e0b9996a42f63e47efc1ca19043e69558b5c523b978d611dfae49c8f",
    "rnet.pt": "bbb937de72efc9ef83b186c49f5f558467a1d7e3453a8ece0d71a886633f6a86",
    "onet.pt": "165bfbe42940416ccfb977545cf0e976d5bf321f67083ae2aaaa5c764280118d",
}

_CELL, _STRIDE = 12, 2  # the proposal network looks at 12 x 12 px and moves by 2
_REFINE_SIDE, _OUTPUT_SIDE = 24, 48  # inputs of the second and third network
# Candidates are suppressed after correction.  Before it and at the usual 0.7, 192 LFW photos took 19.5 ms of processor
# time each instead of 13.2, for the same faces of confidence 0.9 (219 and 220 of facenet-pytorch's 222).
_OVERLAP = 0.6
_GRID = 64  # coordinates are rounded to 1/64 px


@dataclass(frozen=True, eq=False)
class Face:
    """A detected face.  Coordinates x, y in pixels of the photo, pixel centres at integers.

    Attributes:
        box: float32 (4,) x0, y0, x1, y1, clipped to the photo's area (-0.5 .. width - 0.5).
        landmarks: float32 (5, 2): left eye (image left), right eye, nose, left and right mouth corner; not clipped.
        score: the third network's confidence, 0..1.
    """

    box: np.ndarray
    landmarks: np.ndarray
    score: float

    @property
    def area(self) -> float:
        """Area of the box in square pixels."""
        return float((self.box[2] - self.box[0]) * (self.box[3] - self.box[1]))


def _load_weights(name: str) -> dict[str, Tensor]:
    # Found without importing: the package's __init__ needs packages that we do not, and unpickles its files unchecked.
    spec = importlib.util.find_spec("facenet_pytorch")
    if spec is None or spec.origin is None:
        raise WeightsError("facenet-pytorch is not installed (pip install --no-deps facenet-pytorch==2.6.0)")
    path = Path(spec.origin).parent / "data" / name
    content = read_checked(path, SHA256[name])
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def weights_fingerprint() -> str:
    """First 16 hex digits of a sha256 over the digests of the three networks' files."""
    return hashlib.sha256("".join(f"{k}:{v};" for k, v in sorted(SHA256.items())).encode()).hexdigest()[:16]


def _max_pool_2(x: Tensor) -> Tensor:
    """2 x 2 maxima of an even-sized picture; ~10 times ``max_pool2d`` on a CPU, which computes indices too."""
    x = torch.maximum(x[..., ::2, :], x[..., 1::2, :])
    return torch.maximum(x[..., ::2], x[..., 1::2])


def _max_pool_3(x: Tensor) -> Tensor:
    """3 x 3 maxima, stride 2, a last window that reaches beyond the edge counted (``ceil_mode``)."""
    for dim in (-2, -1):
        n = x.shape[dim]
        out = (n - 3 + 1) // 2 + 1
        first = x.narrow(dim, 0, n)[(..., slice(None, None, 2), *([slice(None)] * (-dim - 1)))].narrow(dim, 0, out)
        second = x[(..., slice(1, None, 2), *([slice(None)] * (-dim - 1)))].narrow(dim, 0, out)
        third = x[(..., slice(2, None, 2), *([slice(None)] * (-dim - 1)))]
        pair = torch.maximum(first, second)
        rows = min(third.shape[dim], out)
        if rows == out:
            x = torch.maximum(pair, third.narrow(dim, 0, out))
        else:
            head = torch.maximum(pair.narrow(dim, 0, rows), third.narrow(dim, 0, rows))
            x = torch.cat([head, pair.narrow(dim, rows, out - rows)], dim)
    return x


class _Networks:
    """The three networks as functions of pixels 0..255; outputs are (logit of "face", offsets, ...)."""

    def __init__(self, device: torch.device) -> None:
        def load(name: str) -> dict[str, Tensor]:
            return {k: v.to(device) for k, v in _load_weights(name).items()}

        self.p, self.r, self.o = load("pnet.pt"), load("rnet.pt"), load("onet.pt")
        # They were trained on (pixel - 127.5) / 128: folded into the first layer, so that they take pixels 0..255.
        for w in (self.p, self.r, self.o):
            w["conv1.weight"] = w["conv1.weight"] / 128
            w["conv1.bias"] = w["conv1.bias"] - 127.5 * w["conv1.weight"].sum((1, 2, 3))
        # Softmax over two classes is the sigmoid of a difference: one output channel instead of two.
        self.p_head = self._head(self.p, "conv4_1", "conv4_2")
        self.r_head = self._head(self.r, "dense5_1", "dense5_2")
        self.o_head = self._head(self.o, "dense6_1", "dense6_2", "dense6_3")

    @staticmethod
    def _head(weights: dict[str, Tensor], classes: str, *others: str) -> tuple[Tensor, Tensor]:
        w, b = weights[f"{classes}.weight"], weights[f"{classes}.bias"]
        return (
            torch.cat([w[1:] - w[:1], *(weights[f"{o}.weight"] for o in others)]),
            torch.cat([b[1:] - b[:1], *(weights[f"{o}.bias"] for o in others)]),
        )

    @staticmethod
    def _conv(x: Tensor, w: dict[str, Tensor], i: int) -> Tensor:
        return F.prelu(F.conv2d(x, w[f"conv{i}.weight"], w[f"conv{i}.bias"]), w[f"prelu{i}.weight"])

    @staticmethod
    def _dense(x: Tensor, w: dict[str, Tensor], i: int) -> Tensor:
        x = x.permute(0, 3, 2, 1).flatten(1)  # the weights' order: the original was trained column by column
        return F.prelu(F.linear(x, w[f"dense{i}.weight"], w[f"dense{i}.bias"]), w[f"prelu{i}.weight"])

    def propose(self, x: Tensor) -> Tensor:
        """(B, 3, 2h + 10, 2w + 10) -> (B, 5, h, w): logit and four offsets."""
        x = _max_pool_2(self._conv(x, self.p, 1))
        x = self._conv(self._conv(x, self.p, 2), self.p, 3)
        return F.conv2d(x, *self.p_head)

    def refine(self, x: Tensor) -> Tensor:
        """(N, 3, 24, 24) -> (N, 5): logit and four offsets."""
        x = _max_pool_3(self._conv(x, self.r, 1))
        x = _max_pool_3(self._conv(x, self.r, 2))
        return F.linear(self._dense(self._conv(x, self.r, 3), self.r, 4), *self.r_head)

    def output(self, x: Tensor) -> Tensor:
        """(N, 3, 48, 48) -> (N, 15): logit, four offsets, x and y of five landmarks."""
        x = _max_pool_3(self._conv(x, self.o, 1))
        x = _max_pool_3(self._conv(x, self.o, 2))
        x = _max_pool_2(self._conv(x, self.o, 3))
        return F.linear(self._dense(self._conv(x, self.o, 4), self.o, 5), *self.o_head)


@dataclass(frozen=True)
class _Tile:
    """A resized copy of the photo and its place in a mosaic."""

    top: int
    left: int
    height: int
    width: int


def _pack(sizes: Sequence[tuple[int, int]]) -> tuple[list[_Tile], int, int]:
    """Place pictures, largest first, one beside or below another, as wide as the first; all places even.

    Guillotine packing: each takes the corner of the smallest free rectangle that holds it, and splits the rest in two.
    """
    width = sizes[0][1]
    free: list[_Tile] = []
    tiles, bottom = [], 0
    for h, w in sizes:
        fits = [f for f in free if f.height >= h and f.width >= w]
        if fits:
            place = min(fits, key=lambda f: (f.height * f.width, f.top, f.left))
            free.remove(place)
        else:
            place = _Tile(bottom, 0, h + h % 2, width)
            bottom += place.height
        tiles.append(_Tile(place.top, place.left, h, w))
        h, w = h + h % 2, w + w % 2
        free.append(_Tile(place.top, place.left + w, h, place.width - w))
        free.append(_Tile(place.top + h, place.left, place.height - h, place.width))
    return tiles, bottom, width


@dataclass(frozen=True)
class _Layout:
    """Where the copies of a photo of one size lie.

    ``octaves``: the photo halved again and again, from which candidates are cut; ``levels``: the pyramid that the
    proposal network searches, each level made from octave ``sources[i]``.
    """

    octaves: list[_Tile]
    octave_size: tuple[int, int]
    levels: list[_Tile]
    sources: list[int]
    level_size: tuple[int, int]
    cell_level: Tensor  # (rows, columns) of the proposal network's output: level that the cell lies in, or -1


@functools.lru_cache(maxsize=64)
def _layout(height: int, width: int, min_face_size: float, factor: float) -> _Layout | None:
    """The layout for a search copy of that size; None where the photo cannot hold a face of the least size."""
    scale, sizes, scales = _CELL / min_face_size, [], []
    while min(height, width) * scale >= _CELL:
        # Even sides: the network's pooling then has no half window at the edge.
        sizes.append(tuple(max(_CELL, 2 * math.ceil(n * scale / 2)) for n in (height, width)))
        scales.append(scale)
        scale *= factor
    if not sizes:
        return None
    octave_sizes = [(height, width)]
    while min(octave_sizes[-1]) > _REFINE_SIDE:
        octave_sizes.append(tuple(math.ceil(n / 2) for n in octave_sizes[-1]))
    octaves, octave_rows, octave_width = _pack(octave_sizes)
    levels, rows, columns = _pack(sizes)
    sources = [max(0, min(len(octaves) - 1, math.floor(-math.log2(s)) - 1)) for s in scales]
    cells = torch.full(((rows - 10) // 2, (columns - 10) // 2), -1, dtype=torch.int64)
    for i, t in enumerate(levels):
        cells[t.top // 2 : (t.top + t.height - 10) // 2, t.left // 2 : (t.left + t.width - 10) // 2] = i
    return _Layout(octaves, (octave_rows, octave_width), levels, sources, (rows, columns), cells)


def _resize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, 3, H, W) uint8 -> that size, filtered when shrinking; in fixed point, so the same on every machine."""
    if tuple(picture.shape[-2:]) == size:
        return picture
    return F.interpolate(picture, size=size, mode="bilinear", antialias=True, align_corners=False)


def _square(boxes: Tensor) -> Tensor:
    """Boxes grown to squares about their centres."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True) / 2
    return torch.cat([centre - half, centre + half], 1)


def _regress(boxes: Tensor, offsets: Tensor) -> Tensor:
    return boxes + offsets * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)


def _nms_over_smaller(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """Greedy suppression by intersection over the SMALLER box: drops a part of a face inside its face."""
    order, keep = list(np.argsort(-scores, kind="stable")), []
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    while order:
        i = order.pop(0)
        keep.append(int(i))
        if order:
            rest = np.array(order)
            low, high = np.maximum(boxes[i, :2], boxes[rest, :2]), np.minimum(boxes[i, 2:], boxes[rest, 2:])
            inter = np.prod(np.clip(high - low, 0, None), axis=1)
            order = list(rest[inter <= threshold * np.minimum(area[i], area[rest])])
    return keep


def _in_order(faces: list[Face]) -> list[Face]:
    """By descending area, then left to right, then top to bottom."""
    return sorted(faces, key=lambda f: (-f.area, float(f.box[0]), float(f.box[1])))


class FaceDetector:
    """MTCNN over many photos.

    Args:
        device: where the networks run.
        min_face_size: side of the smallest face searched for, in pixels of the search copy.
        thresholds: least confidence of the three stages.
        min_confidence: least confidence of a face that is returned, applied after suppression.  The third threshold
            alone (MTCNN's usual 0.7) lets through ties, microphones and picture frames; a false face costs as much work
            as a real one, and its photo is changed for nothing.
        max_side: longest side of the search copy in pixels.  A larger photo is searched on a reduced copy, so the
            smallest face found is ``min_face_size * longest side / max_side`` pixels of the photo: 20 px up to 1600 px,
            68 px for 20 MP (5472 x 3648).  Landmarks of faces that the copy shows smaller than the third network's
            input are computed again on the photo's own pixels.
        factor: ratio of neighbouring pyramid levels.
        batch_size: photos of the same size that go through the networks together (on a CPU the proposal network
            takes them one by one: together they would only leave the cache).

    Raises:
        WeightsError: the package facenet-pytorch is missing, or its files are not those of 2.6.0.
        ValueError: parameters out of range.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        *,
        min_face_size: float = 20,
        thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7),
        min_confidence: float = 0.9,
        max_side: int = 1600,
        factor: float = 0.709,
        batch_size: int = 8,
    ) -> None:
        if not min_face_size >= 4:
            raise ValueError(f"min_face_size must be at least 4, got {min_face_size}")
        if len(thresholds) != 3 or not all(0 < t < 1 for t in thresholds) or not 0 <= min_confidence < 1:
            raise ValueError(f"thresholds must be three numbers in 0..1, got {thresholds}, {min_confidence}")
        if max_side < _OUTPUT_SIDE or not 0.3 <= factor <= 0.95 or batch_size < 1:
            raise ValueError(f"max_side >= 48, factor 0.3..0.95, batch_size >= 1: {max_side}, {factor}, {batch_size}")
        self.device = torch.device(device)
        self.min_face_size, self.max_side, self.factor = min_face_size, max_side, factor
        self.thresholds, self.min_confidence, self.batch_size = thresholds, min_confidence, batch_size
        self._networks = _Networks(self.device)

    @torch.inference_mode()
    def detect(self, photos: Sequence[np.ndarray]) -> list[list[Face]]:
        """All faces of each photo.

        Args:
            photos: uint8 arrays (H, W, 3), RGB, upright, of any sizes; those of one size are batched.

        Returns:
            For each photo its faces, by descending box area, then left to right (then top to bottom).  A photo too
            small for a face has none.  Coordinates are rounded to 1/64 px and every photo's arithmetic has the same
            shapes whatever its neighbours, so the result does not depend on how photos are grouped.

        Raises:
            TypeError: a photo is not a uint8 array.
            ValueError: a photo's shape is not (H, W, 3).
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for i, photo in enumerate(photos):
            if not isinstance(photo, np.ndarray) or photo.dtype != np.uint8:
                kind = getattr(photo, "dtype", type(photo).__name__)
                raise TypeError(f"photo {i}: expected a uint8 array, got {kind}")
            if photo.ndim != 3 or photo.shape[2] != 3:
                raise ValueError(f"photo {i}: expected shape (H, W, 3), got {photo.shape}")
            groups.setdefault(photo.shape[:2], []).append(i)
        found: list[list[Face]] = [[] for _ in photos]
        for size, members in groups.items():
            if min(size) < _CELL:
                continue
            for start in range(0, len(members), self.batch_size):
                chunk = members[start : start + self.batch_size]
                for i, faces in zip(chunk, self._detect_same_size([photos[i] for i in chunk]), strict=True):
                    found[i] = faces
        return found

    def _detect_same_size(self, photos: list[np.ndarray]) -> list[list[Face]]:
        height, width = photos[0].shape[:2]
        reduction = min(1.0, self.max_side / max(height, width))
        size = (max(1, round(height * reduction)), max(1, round(width * reduction)))
        layout = _layout(*size, self.min_face_size, self.factor)
        if layout is None:
            return [[] for _ in photos]
        # A copy only where PyTorch cannot share the memory: read-only, or strides that it does not know.
        photos = [p if p.flags.writeable and p.flags.c_contiguous else p.copy() for p in photos]
        pictures = [torch.from_numpy(p).permute(2, 0, 1)[None] for p in photos]
        octaves, levels = [], []
        for picture in pictures:
            copies = self._copies(_resize(picture, size), layout)
            octaves.append(copies[0].to(self.device).contiguous().float())
            levels.append(copies[1])
        boxes, owner = self._propose(levels, layout)
        boxes, owner, _ = self._stage(octaves, boxes, owner, layout, second=True)
        boxes, owner, marks = self._stage(octaves, boxes, owner, layout, second=False)
        if len(boxes):
            # Once more on its own result: the few faces left are now centred, which costs little and mends both the
            # confidence and the landmarks of those that the suppression above left with a poor square.
            again, _, points = self._stage(octaves, _square(boxes[:, :4]), owner, layout, second=False, threshold=-1)
            better = again[:, 4] >= boxes[:, 4]
            boxes = torch.where(better[:, None], again, boxes)
            marks = torch.where(better[:, None, None], points, marks)
        scores = boxes[:, 4]
        to_photo = boxes.new_tensor([width / size[1], height / size[0]])
        boxes, marks = boxes[:, :4] * to_photo.repeat(2), marks * to_photo
        boxes_np, marks_np, scores_np = boxes.cpu().numpy(), marks.cpu().numpy(), scores.cpu().numpy()
        owner_np = owner.cpu().numpy()
        return [
            self._faces(picture, boxes_np[rows], marks_np[rows], scores_np[rows], reduction)
            for i, picture in enumerate(pictures)
            for rows in [np.nonzero(owner_np == i)[0]]
        ]

    def _copies(self, picture: Tensor, layout: _Layout) -> tuple[Tensor, Tensor]:
        """Both mosaics of one photo: uint8 (1, 3, ...), channels last."""

        # Rows of an (H, W, 3) array are contiguous: numpy copies them whole, PyTorch byte by byte.
        octave_mosaic = np.zeros((*layout.octave_size, 3), np.uint8)
        level_mosaic = np.zeros((*layout.level_size, 3), np.uint8)
        copies = []
        for i, t in enumerate(layout.octaves):
            copies.append(_resize(copies[-1], (t.height, t.width)) if i else picture)
            octave_mosaic[t.top : t.top + t.height, t.left : t.left + t.width] = copies[-1][0].permute(1, 2, 0).numpy()
        for t, source in zip(layout.levels, layout.sources, strict=True):
            level = _resize(copies[source], (t.height, t.width))
            level_mosaic[t.top : t.top + t.height, t.left : t.left + t.width] = level[0].permute(1, 2, 0).numpy()
        return tuple(torch.from_numpy(m).permute(2, 0, 1)[None] for m in (octave_mosaic, level_mosaic))

    def _propose(self, mosaics: list[Tensor], layout: _Layout) -> tuple[Tensor, Tensor]:
        """First stage: squares (N, 4) in edge coordinates of the search copy, and the photo that each is from."""
        together = len(mosaics) if self.device.type != "cpu" else 1
        cells = layout.cell_level.to(self.device)
        # About 96,000 pixels at once: what a layer makes of them stays in the cache (whole photos take twice as long).
        rows = max(1, 48_000 // layout.level_size[1]) if self.device.type == "cpu" else cells.shape[0]
        least = math.log(self.thresholds[0] / (1 - self.thresholds[0]))
        hits: list[tuple[Tensor, ...]] = []
        for first in range(0, len(mosaics), together):
            batch = torch.cat(mosaics[first : first + together]).to(self.device)
            for top in range(0, cells.shape[0], rows):
                count = min(rows, cells.shape[0] - top)
                strip = batch[:, :, 2 * top : 2 * (top + count) + 10, : 2 * cells.shape[1] + 10]
                out = self._networks.propose(strip.contiguous().float())
                where = (out[:, 0] >= least) & (cells[top : top + count] >= 0)
                photo, y, x = where.nonzero(as_tuple=True)
                values = out.permute(0, 2, 3, 1)[photo, y, x]
                hits.append((photo + first, y + top, x, cells[y + top, x], values))
        photo, y, x, level, values = (torch.cat(parts) for parts in zip(*hits, strict=True))
        tiles = layout.levels
        tops, lefts = (torch.tensor(v, device=self.device) for v in ([t.top for t in tiles], [t.left for t in tiles]))
        step_x = values.new_tensor([layout.octaves[0].width / t.width for t in tiles])[level]
        step_y = values.new_tensor([layout.octaves[0].height / t.height for t in tiles])[level]
        x0, y0 = (_STRIDE * x - lefts[level]) * step_x, (_STRIDE * y - tops[level]) * step_y
        boxes = torch.stack([x0, y0, x0 + _CELL * step_x, y0 + _CELL * step_y], 1)
        keep = batched_nms(boxes, values[:, 0], photo * len(tiles) + level, 0.5)
        boxes, photo, values = _square(_regress(boxes[keep], values[keep, 1:])), photo[keep], values[keep]
        keep = batched_nms(boxes, values[:, 0], photo, _OVERLAP)
        return boxes[keep], photo[keep]

    def _stage(
        self,
        octaves: list[Tensor],
        boxes: Tensor,
        owner: Tensor,
        layout: _Layout,
        *,
        second: bool,
        threshold: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Second stage: squares (N, 4), owners; third: boxes with scores (N, 5), owners, landmarks (N, 5, 2)."""
        side = _REFINE_SIDE if second else _OUTPUT_SIDE
        threshold = self.thresholds[1 if second else 2] if threshold is None else threshold
        crops, order = [boxes.new_zeros(0, 3, side, side)], [torch.zeros(0, dtype=torch.int64, device=boxes.device)]
        for i, octave in enumerate(octaves):
            order.append((owner == i).nonzero()[:, 0])
            if len(order[-1]):
                crops.append(self._cut(octave, boxes[order[-1]], side, layout))
        values, rows = self._apply(torch.cat(crops), second=second), torch.cat(order)
        boxes, owner, scores = boxes[rows], owner[rows], values[:, 0].sigmoid()
        keep = scores > threshold
        boxes, owner, scores, values = boxes[keep], owner[keep], scores[keep], values[keep]
        if second:
            boxes = _square(_regress(boxes, values[:, 1:]))
            keep = batched_nms(boxes, scores, owner, _OVERLAP)
            return boxes[keep], owner[keep], boxes.new_zeros(len(keep), 0, 2)
        marks = torch.stack([values[:, 5:10], values[:, 10:15]], -1)
        marks = boxes[:, None, :2] + marks * (boxes[:, None, 2:4] - boxes[:, None, :2])
        return torch.cat([_regress(boxes, values[:, 1:5]), scores[:, None]], 1), owner, marks

    def _apply(self, crops: Tensor, *, second: bool) -> Tensor:
        """Second or third network over crops (N, 3, side, side).

        Always in batches of the same size, the last one padded: libraries choose their kernels by the shape, so this
        keeps a candidate's arithmetic the same whatever goes with it.
        """
        network, chunk, width = (self._networks.refine, 32, 5) if second else (self._networks.output, 8, 15)
        parts = [crops.new_zeros(0, width)]
        for some in crops.split(chunk) if len(crops) else ():
            parts.append(network(F.pad(some, (0, 0, 0, 0, 0, 0, 0, chunk - len(some))))[: len(some)])
        return torch.cat(parts)

    def _cut(self, octave: Tensor, boxes: Tensor, side: int, layout: _Layout) -> Tensor:
        """Squares (N, 4) of the search copy -> (N, 3, side, side), mean of 2 x 2 samples an output pixel."""
        tiles = layout.octaves
        # Of a square that reaches over the edge, the part inside, stretched, as facenet-pytorch does: repeating the
        # edge's pixels instead found fewer of its faces that the edge cuts.
        limit = boxes.new_tensor([tiles[0].width, tiles[0].height] * 2)
        boxes = torch.minimum(boxes.clamp(min=0), limit)
        extent = (boxes[:, 2:] - boxes[:, :2]).amax(1).clamp(min=1e-3)
        # The octave in which an output pixel spans 1 to 2 pixels: 2 x 2 samples then miss none.
        index = torch.floor(torch.log2(extent / side)).long().clamp(0, len(tiles) - 1)
        place = boxes.new_tensor([[t.left, t.top, t.width, t.height] for t in tiles])[index]
        step = place[:, 2:] / place[:1, 2:].new_tensor([tiles[0].width, tiles[0].height])
        at = (torch.arange(2 * side, device=boxes.device) + 0.5) / (2 * side)
        points = boxes[:, None, :2] + at[None, :, None] * (boxes[:, None, 2:4] - boxes[:, None, :2])  # (N, 2 side, 2)
        points = points * step[:, None]
        points = torch.minimum(points.clamp(min=0.5), place[:, None, 2:] - 0.5) + place[:, None, :2]
        points = points * (2 / points.new_tensor([octave.shape[3], octave.shape[2]])) - 1
        n = len(boxes)
        shape = (n, 2 * side, 2 * side)
        grid = torch.stack([points[:, None, :, 0].expand(shape), points[:, :, None, 1].expand(shape)], -1)
        picture = F.grid_sample(octave, grid.reshape(1, n * 2 * side, 2 * side, 2), align_corners=False)
        return F.avg_pool2d(picture, 2)[0].reshape(3, n, side, side).transpose(0, 1).contiguous()

    def _faces(
        self, picture: Tensor, boxes: np.ndarray, marks: np.ndarray, scores: np.ndarray, reduction: float
    ) -> list[Face]:
        """Final suppression, landmarks at full detail, pixel-centre coordinates, order."""
        height, width = picture.shape[-2:]
        keep = [i for i in _nms_over_smaller(boxes, scores, 0.7) if scores[i] >= self.min_confidence]
        faces = []
        for i in keep:
            points = marks[i]
            if reduction < 1 and (boxes[i, 2:] - boxes[i, :2]).max() * reduction < _OUTPUT_SIDE:
                points = self._landmarks_at_full_detail(picture, boxes[i])
            # Edge coordinates have pixel 0 at 0..1, design.md's have its centre at 0.
            box = np.clip(boxes[i] - 0.5, -0.5, [width - 0.5, height - 0.5] * 2)
            box, points = (np.round(a * _GRID) / _GRID for a in (box, points - 0.5))
            if box[2] > box[0] and box[3] > box[1]:
                faces.append(Face(box.astype(np.float32), points.astype(np.float32), float(scores[i])))
        return _in_order(faces)

    def _landmarks_at_full_detail(self, picture: Tensor, box: np.ndarray) -> np.ndarray:
        """Third network on the photo's own pixels about a box (edge coordinates): landmarks (5, 2)."""
        height, width = picture.shape[-2:]
        square = _square(torch.from_numpy(box)[None])[0].round().to(torch.int64)
        x0, y0, x1, y1 = (int(v) for v in square)
        xs, ys = torch.arange(x0, x1).clamp(0, width - 1), torch.arange(y0, y1).clamp(0, height - 1)
        crop = picture[:, :, ys][..., xs].contiguous(memory_format=torch.channels_last)
        crop = _resize(crop, (_OUTPUT_SIDE, _OUTPUT_SIDE)).to(self.device).float()
        values = self._apply(crop, second=False)[0].cpu().numpy()
        return np.array([x0, y0]) + np.stack([values[5:10], values[10:15]], 1) * [x1 - x0, y1 - y0]
