"""The stages that look at photos: embed the people of the gallery; measure an original and its protected photo.

What is measured of a face (columns: `face_schema`): cosines of its recognised features to the original's and to another
photo's of the same person, and the rank of that person among all people of the gallery; for the protected photo as it
is and after each distortion, for the unprotected one likewise (what a distortion does by itself), and for the photo
of somebody else (what perfect protection would give).  The face is detected anew in the protected file, as anybody
would who wants to know who it is; after a distortion it is taken where it must lie then, which does the protection no
favour.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster import Operator
from cluster.files import Files
from pipelines.archive.paths import SourceError
from pipelines.archive.reading import read_bytes
from pipelines.evaluate import judges
from pipelines.evaluate.pairs import OK, UNREADABLE, text_fields
from pipelines.networks import load as networks
from pipelines.photos.codec import decode
from pipelines.photos.photo import Photo, PhotoError
from pipelines.run.schemas import face_id, row_seed
from pipelines.stages.crops import to_tensor
from pipelines.stages.rows import iterate, reason_of
from scol_ops.alignment import align_crops, ffhq_quads
from scol_ops.detection import Face
from scol_ops.distortions import NONE, Distortion
from scol_ops.metrics import candidate_ranks, flip_map, photo_difference, psnr, ssim, to_uint8
from scol_ops.models.recognisers import Recogniser
from scol_ops.paste import face_mask
from scol_ops.visibility import face_jod
from scol_ops.warp import GeometryError, crop_transform, invert_affine, transform_points

# Raise these when results change: rows are then made anew.
MEASURE_VERSION = "3"
EMBED_VERSION = "1"
NO_FACE, SHAPE, ERROR = "no_face", "shape_differs", "error"
UNPROTECTED, OTHER = "unprotected", "other"
# Of detection; as `scol protect` finds faces by default.
DETECTOR = {"min_face_size": 20.0, "min_confidence": 0.9, "max_side": 1600}
CROP = 256

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Settings:
    """What the measures depend on besides the photos.

    Attributes:
        recognisers: names, see `scol_ops.models.recognisers`.
        distortions: names, see `scol_ops.distortions`; `none` always goes first and is not named here.
        photo: also measure whole photos, not only face crops.
        lpips: name of the LPIPS to measure, or None.
        seed: of the other people that stand in for perfect protection.
        store: URL of the model store; None for the default one.
        device: see `networks.load.pick_device`.
    """

    recognisers: tuple[str, ...]
    distortions: tuple[str, ...]
    photo: bool = True
    lpips: str | None = None
    seed: int = 0
    store: str | None = None
    device: str = "auto"

    @property
    def picture(self) -> tuple[str, ...]:
        """Measures over the face crop and the face alone, for every variant."""
        return PICTURE if self.lpips is None else (*PICTURE, LPIPS)

    @property
    def whole(self) -> tuple[str, ...]:
        """Measures over whole photos."""
        return () if not self.photo else WHOLE if self.lpips is None else (*WHOLE, f"photo_{LPIPS}")

    @property
    def variants(self) -> tuple[str, ...]:
        return (NONE, *self.distortions)

    def to_dict(self) -> dict[str, Any]:
        """Without what results do not depend on."""
        return {k: v for k, v in asdict(self).items() if k not in ("device", "store")}


def column(measure: str, recogniser: str = "", variant: str = NONE, subject: str = "") -> str:
    """Name of a column of the faces: `ism_faceres`, `rank_faceres@jpeg75`, `unprotected_rank_faceres@jpeg75`,
    `psnr@jpeg75`."""
    name = "_".join(part for part in (subject, measure, recogniser) if part)
    return name if variant == NONE else f"{name}@{variant}"


IDENTITY = ("ism", "mate", "rank")
PICTURE = ("psnr", "ssim", "flip", "face_psnr", "face_ssim", "face_flip", "mean_change", "max_change")
LOOK = ("jod", "jod_4k")  # of the files as they are: `visibility.face_jod`
LPIPS = "lpips"
LPIPS_SIDE = 64  # smaller pictures do not pass its networks
LPIPS_PIXELS = 2_000_000  # larger photos have no LPIPS as a whole: its maps would take gigabytes
WHOLE = ("photo_psnr", "photo_ssim", "photo_flip", "photo_mean_change", "photo_max_change")


def face_schema(settings: Settings) -> pa.Schema:
    """Columns of the faces' table; documented in docs/evaluate.md."""
    fields = [
        *text_fields("key photo_id face_id? path url protected_path? protected_url? person_id? status reason?"),
        *(pa.field(name, pa.bool_()) for name in ("central", "detected", "has_mate", "same_size", "same_bytes")),
        pa.field("box", pa.list_(pa.float32(), 4)),
        pa.field("landmarks", pa.list_(pa.float32(), 10)),
        pa.field("seconds", pa.float32()),
    ]
    names = [*LOOK, *(column(m, "", v) for v in settings.variants for m in settings.picture), *settings.whole]
    for recogniser in settings.recognisers:
        for variant in settings.variants:
            for subject in ("", UNPROTECTED):
                names += [column(m, recogniser, variant, subject) for m in IDENTITY]
        names += [column(m, recogniser, NONE, OTHER) for m in IDENTITY]
    return pa.schema([*fields, *(pa.field(name, pa.float32()) for name in names)])


# ---- faces and embeddings --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Spot:
    """Where a face is: landmarks (5, 2) and box (4,) in a picture's pixels."""

    landmarks: NDArray[np.float64]
    box: NDArray[np.float64]

    @staticmethod
    def of(face: Face) -> Spot:
        return Spot(np.asarray(face.landmarks, np.float64), np.asarray(face.box, np.float64))

    def moved(self, points) -> Spot:
        """Through a function of (n, 2) points."""
        return Spot(points(self.landmarks), points(self.box.reshape(2, 2)).reshape(4))

    @property
    def quad(self) -> Tensor:
        """(1, 4, 2), the FFHQ crop's corners."""
        return ffhq_quads(torch.from_numpy(self.landmarks)[None])


@dataclass(frozen=True, eq=False)
class Window:
    """The part of a picture about a face, and the face in it: large photos are not distorted as a whole.

    It begins at multiples of 16 pixels, so that a JPEG's blocks lie as they would in the whole photo.
    """

    pixels: Pixels
    spot: Spot

    @staticmethod
    def about(pixels: Pixels, spot: Spot) -> Window:
        points = np.concatenate([spot.quad[0].numpy(), spot.box.reshape(2, 2)])
        low, high = points.min(0), points.max(0)
        margin = 0.3 * (high - low).max() + 16
        left, top = (int(max(0, v // 16 * 16)) for v in low - margin)
        right, bottom = (int(v) + 1 for v in high + margin)
        part = np.ascontiguousarray(pixels[top:bottom, left:right])
        return Window(part, spot.moved(lambda p: p - [left, top]))

    def distorted(self, distortion: Distortion) -> Window:
        pixels, place = distortion(self.pixels)
        return Window(pixels, self.spot.moved(place.points))


def central(boxes: NDArray, width: int, height: int) -> int:
    """Index of the box whose centre is nearest the picture's; boxes (n, 4), n > 0."""
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 - [(width - 1) / 2, (height - 1) / 2]
    return int(np.argmin((middle**2).sum(1)))


def overlap(a: NDArray, b: NDArray) -> float:
    """Intersection over union of two boxes."""
    inner = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return float(inner / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inner))


def nearest(found: Sequence[Spot], expected: Spot) -> Spot | None:
    """Of the faces found, the one whose box overlaps that of the one expected most, by 0.2 at least."""
    near = max(found, key=lambda spot: overlap(spot.box, expected.box), default=None)
    return near if near is not None and overlap(near.box, expected.box) >= 0.2 else None


class Eyes:
    """A worker's detector and recognisers."""

    def __init__(
        self, recognisers: Sequence[str], device: str = "cpu", lpips: str | None = None, store: str | None = None
    ) -> None:
        networks.set_up()
        self.device = networks.pick_device(device)
        self.networks: list[Recogniser] = [judges.load(name, self.device, store) for name in recognisers]
        self.lpips = None if lpips is None else judges.load_lpips(lpips, self.device, store)
        self.detector = networks.detector(
            self.device, DETECTOR["min_face_size"], DETECTOR["min_confidence"], DETECTOR["max_side"], 4
        )

    def faces(self, pixels: Pixels) -> list[Spot]:
        return [Spot.of(face) for face in self.detector.detect([np.ascontiguousarray(pixels)])[0]]

    def distance(self, a: Pixels, b: Pixels) -> float:
        """LPIPS of two pictures of one size."""
        with torch.no_grad():
            return float(self.lpips(to_tensor(a, self.device), to_tensor(b, self.device)))

    def embed(self, windows: Sequence[Window]) -> list[NDArray[np.float32]]:
        """Each recogniser's unit embeddings (n, dim) of n windows' faces."""
        out = []
        with torch.no_grad():
            for network in self.networks:
                aligned = [
                    network.align(
                        to_tensor(w.pixels, self.device),
                        torch.from_numpy(w.spot.landmarks)[None].float(),
                        torch.from_numpy(w.spot.box)[None].float(),
                    )
                    for w in windows
                ]
                out.append(network.embed_aligned(torch.cat(aligned)).float().cpu().numpy())
        return out

    def embed_central(self, url: str, not_this: bytes = b"") -> tuple[list[NDArray[np.float32]] | None, str | None]:
        """Each recogniser's unit embedding (dim,) of `central_window`'s face; else None and the reason."""
        window, reason = central_window(self, url, not_this)
        if window is None:
            return None, reason
        try:
            return [e[0] for e in self.embed([window])], None
        except GeometryError as error:
            return None, f"GEOMETRY: {error}"


@lru_cache(2)
def _eyes(settings: Settings) -> Eyes:
    return Eyes(settings.recognisers, settings.device, settings.lpips, settings.store)


# ---- the gallery -----------------------------------------------------------------------------------------------------


def reference_source_schema() -> pa.Schema:
    photos = pa.field("photos", pa.list_(pa.string()), False)
    return pa.schema([*text_fields("key person_id"), photos, *text_fields("status reason?")])


def reference_schema(recognisers: Sequence[str], dims: Mapping[str, int]) -> pa.Schema:
    embeddings = (pa.field(f"embedding_{name}", pa.list_(pa.float32(), dims[name])) for name in recognisers)
    return pa.schema([*text_fields("key person_id url? status reason?"), *embeddings])


def central_window(eyes: Eyes, url: str, not_this: bytes = b"") -> tuple[Window | None, str | None]:
    """The middle face of a photo; else None and the reason. `not_this`: a file that it must not be."""
    try:
        data = read_bytes(url)
        if data == not_this:
            return None, "SAME_PHOTO: the same file"
        pixels = decode(data).pixels
    except (PhotoError, SourceError) as error:
        return None, str(error)
    spots = eyes.faces(pixels)
    if not spots:
        return None, "NO_FACE: no face was found"
    spot = spots[central(np.stack([s.box for s in spots]), pixels.shape[1], pixels.shape[0])]
    return Window.about(pixels, spot), None


def embed_operator(settings: Settings, schema: pa.Schema) -> Operator:
    """Rows of `reference_source_schema` to `reference_schema`: of each person the first photo that shows a face."""
    eyes = _eyes(settings)

    def reference(row: Mapping[str, Any]) -> dict[str, Any]:
        answer = {"key": row["key"], "person_id": row["person_id"]}
        reason: str | None = "NO_PHOTO: none was offered"
        for url in row["photos"]:
            found, reason = eyes.embed_central(url)
            if found is not None:
                names = (f"embedding_{name}" for name in settings.recognisers)
                return answer | {"status": OK, "url": url} | dict(zip(names, found, strict=True))
        return answer | {"status": ERROR, "reason": reason}

    return lambda table: pa.Table.from_pylist([reference(row) for row in table.to_pylist()], schema)


def no_reference(schema: pa.Schema, table: pa.Table, reason: str) -> pa.Table:
    """What the engine writes where `embed_operator` could not."""
    why = {"status": ERROR, "reason": reason}
    return pa.Table.from_pylist([row | why for row in table.select(["key", "person_id"]).to_pylist()], schema)


@dataclass(frozen=True, eq=False)
class Gallery:
    """People to be mistaken for: for each recogniser (N, dim) unit embeddings; N people, one photo each, and its
    URL."""

    people: list[str]
    urls: list[str]
    embeddings: list[NDArray[np.float32]]

    @staticmethod
    def read(url: str, recognisers: Sequence[str]) -> Gallery:
        with Files(url).open() as file:
            table = pq.ParquetFile(file).read(use_threads=False)
        found = []
        for name in recognisers:
            values = table[f"embedding_{name}"].combine_chunks()
            found.append(values.flatten().to_numpy().reshape(table.num_rows, values.type.list_size))
        return Gallery(table["person_id"].to_pylist(), table["url"].to_pylist(), found)


# ---- a photo ---------------------------------------------------------------------------------------------------------


def measure_operator(settings: Settings, schema: pa.Schema, gallery_url: str) -> Operator:
    """Rows of `pairs.PAIR_SCHEMA` to rows of `face_schema`."""
    worker = Measurer(settings, _eyes(settings), Gallery.read(gallery_url, settings.recognisers))

    def run(table: pa.Table) -> pa.Table:
        rows = [answer for row in iterate(table) for answer in worker.photo(row)]
        return pa.table([pa.array([row.get(f.name) for row in rows], f.type) for f in schema], schema=schema)

    return run


def error_rows(schema: pa.Schema, table: pa.Table, reason: str) -> pa.Table:
    """What the engine writes where the operator could not."""
    rows = [base(row) | {"status": ERROR, "reason": reason} for row in table.to_pylist()]
    return pa.Table.from_pylist(rows, schema)


def base(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("key", "photo_id", "path", "url", "protected_path", "protected_url", "person_id", "status", "reason")
    return {name: row[name] for name in names} | {"face_id": None}


class Measurer:
    """Measures photos against a gallery. One a worker."""

    def __init__(self, settings: Settings, eyes: Eyes, gallery: Gallery) -> None:
        self.settings, self.eyes, self.gallery = settings, eyes, gallery
        self.distortions = [Distortion(name) for name in settings.variants]
        self.people = np.array(gallery.people, object)

    def photo(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One row for each face of the original, or one that says why there is none."""
        begin = time.monotonic()

        def none(status: str, reason: str) -> list[dict[str, Any]]:
            return [base(row) | {"status": status, "reason": reason, "seconds": time.monotonic() - begin}]

        if row["status"] != OK:
            return none(row["status"], row["reason"])
        photos: list[Photo] = []
        for which, url in (("", row["url"]), (" (the protected photo)", row["protected_url"])):
            try:
                photos.append(decode(read_bytes(url)))
            except (PhotoError, SourceError) as error:
                return none(UNREADABLE, reason_of(error) + which)
        original, protected = (photo.pixels for photo in photos)
        spots = self.eyes.faces(original)
        if not spots:
            return none(NO_FACE, "NO_FACE: no face was found in the original")
        (height, width), (high, wide) = original.shape[:2], protected.shape[:2]
        if abs(high / height * width / wide - 1) > max(0.02, 1.5 / min(high, wide)):
            return none(SHAPE, f"SHAPE_DIFFERS: {width} x {height} and {wide} x {high} are not the same picture")
        common = base(row) | self._whole(original, protected) | {"same_bytes": photos[0].source == photos[1].source}
        middle = central(np.stack([s.box for s in spots]), width, height)
        found, mate = self.eyes.faces(protected), self.mate(row, photos[0].source)
        scale = np.array([wide / width, high / height])
        rows = []
        for index, spot in enumerate(spots):
            named = index == middle
            answer = common | {
                "face_id": face_id(row["photo_id"], index),
                "central": named,
                "person_id": row["person_id"] if named else None,
                "has_mate": False,
                "box": spot.box.astype(np.float32),
                "landmarks": spot.landmarks.reshape(-1).astype(np.float32),
            }
            expected = spot.moved(lambda p: (p + 0.5) * scale - 0.5)
            near = nearest(found, expected)
            own = mate if answer["person_id"] is not None else None
            try:
                measures = self._face(original, protected, (spot, near or expected, expected), answer, own)
            except GeometryError as error:
                measures = {"status": ERROR, "reason": f"GEOMETRY: {error}"}
            rows.append(answer | {"detected": near is not None} | measures)
        seconds = (time.monotonic() - begin) / len(rows)
        return [answer | {"seconds": seconds} for answer in rows]

    def _whole(self, original: Pixels, protected: Pixels) -> dict[str, Any]:
        """Whether both photos have one size, and then the measures over all of them."""
        height, width = original.shape[:2]
        out: dict[str, Any] = {"same_size": original.shape == protected.shape}
        if out["same_size"] and self.settings.photo and min(height, width) >= 11:
            out |= {f"photo_{name}": value for name, value in vars(photo_difference(original, protected)).items()}
            if self.eyes.lpips is not None and height * width <= LPIPS_PIXELS and min(height, width) >= LPIPS_SIDE:
                out[f"photo_{LPIPS}"] = self.eyes.distance(original, protected)
        return out

    def mate(self, row: Mapping[str, Any], original: bytes) -> list[NDArray[np.float32]] | None:
        """Embeddings of the first other photo of the person that shows a face; a copy of the original is none."""
        for url in row["mates"] if row["mates"] is not None else ():
            found, _ = self.eyes.embed_central(url, original)
            if found is not None:
                return found
        return None

    def _face(
        self,
        original: Pixels,
        protected: Pixels,
        spots: tuple[Spot, Spot, Spot],
        answer: Mapping[str, Any],
        mate: list[NDArray[np.float32]] | None,
    ) -> dict[str, Any]:
        """`spots`: the face in the original; in the protected photo, as found; there, as expected."""
        spot, seen, expected = spots
        person, seed = answer["person_id"], row_seed(self.settings.seed, answer["face_id"])
        before, after = Window.about(original, spot), Window.about(protected, seen)
        # The picture's measures compare the same place of both, wherever the detector sees the face now.
        place = Window.about(protected, expected)
        pairs = [(before.distorted(d), after.distorted(d), place.distorted(d)) for d in self.distortions]
        out: dict[str, Any] = {"has_mate": mate is not None}
        out |= self._pictures([(one, three) for one, _, three in pairs])
        if original.shape == protected.shape:
            out |= face_jod(original, protected, spot.quad[0].numpy())
        embedded = self.eyes.embed([w for pair in pairs for w in pair[:2]])
        for number, recogniser in enumerate(self.settings.recognisers):
            found = embedded[number]
            probes: dict[tuple[str, str], NDArray[np.float32]] = {}
            for i, variant in enumerate(self.settings.variants):
                probes[UNPROTECTED, variant], probes["", variant] = found[2 * i], found[2 * i + 1]
            own = probes[UNPROTECTED, NONE]
            other = None if mate is None else mate[number]
            out |= self.identity(number, recogniser, probes, own, person, other, seed)
        return out

    def identity(
        self,
        number: int,
        recogniser: str,
        probes: Mapping[tuple[str, str], NDArray[np.float32]],
        own: NDArray[np.float32],
        person: str | None,
        mate: NDArray[np.float32] | None,
        seed: int,
    ) -> dict[str, Any]:
        """Cosines and ranks of a face's probes, named by `column`.

        Args:
            number, recogniser: its place among the settings', and its name.
            probes: (subject, variant) -> unit embedding (dim,). own: of the original. mate: of another photo, or None.
            person: who is no candidate to be mistaken for; None: nobody. seed: of the draw of somebody else.
        """
        out: dict[str, Any] = {}
        gallery = self.gallery.embeddings[number]
        others = self.people != person
        names, rows = list(probes), np.stack(list(probes.values()))
        masks = np.repeat(others[None], len(rows), 0)
        if others.any():  # somebody else's photo, which is not in the gallery while it is looked for
            stranger = int(np.flatnonzero(others)[seed % int(others.sum())])
            names.append((OTHER, NONE))
            rows = np.concatenate([rows, gallery[stranger][None]])
            masks = np.concatenate([masks, masks[:1]])
            masks[-1, stranger] = False
        known = np.flatnonzero(masks.any(1))  # whose rank can be told: there is somebody to be mistaken for
        own_cosines = np.clip(rows @ own, -1, 1)
        mate_cosines = None if mate is None else np.clip(rows @ mate, -1, 1)
        ranks: dict[int, float] = {}
        if mate is not None and len(known):
            found = candidate_ranks(mate_cosines[known], np.clip(rows[known] @ gallery.T, -1, 1), masks[known])
            ranks = dict(zip(known.tolist(), found.tolist(), strict=True))
        for i, (subject, variant) in enumerate(names):
            out[column("ism", recogniser, variant, subject)] = float(own_cosines[i])
            if mate_cosines is not None:
                out[column("mate", recogniser, variant, subject)] = float(mate_cosines[i])
            if i in ranks:
                out[column("rank", recogniser, variant, subject)] = float(ranks[i])
        return out

    def _pictures(self, pairs: Sequence[tuple[Window, Window]]) -> dict[str, Any]:
        """Over the FFHQ crop and the face in it, both pictures distorted alike."""
        out: dict[str, Any] = {}
        spot = pairs[0][0].spot  # undistorted; where the face lies in the crop stays the same
        landmarks = transform_points(
            torch.from_numpy(spot.landmarks), invert_affine(crop_transform(spot.quad[0], CROP))
        )
        face = face_mask(landmarks[None].float(), CROP)[0, 0].numpy() > 0.5
        for variant, (one, two) in zip(self.settings.variants, pairs, strict=True):
            a, b = (to_uint8(align_crops(w.pixels, w.spot.quad, CROP)[0]) for w in (one, two))
            seen, change = flip_map(a, b), np.abs(a.astype(np.int16) - b)
            found = {
                "psnr": psnr(a, b),
                "ssim": ssim(a, b),
                "flip": float(seen.mean(dtype=np.float64)),
                "mean_change": float(change.mean()),
                "max_change": int(change.max()),
            }
            if face.any():
                found |= {"face_psnr": psnr(a, b, face), "face_ssim": ssim(a, b, face)}
                found["face_flip"] = float(seen[face].mean(dtype=np.float64))
            if self.eyes.lpips is not None:
                found[LPIPS] = self.eyes.distance(a, b)
            out |= {column(measure, "", variant): value for measure, value in found.items()}
        return out
