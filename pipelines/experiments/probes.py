"""Probes of an experiment: photos of a run, with their pictures after each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster import hash_key
from cluster.files import replacing
from pipelines.archive.entry import SourceRow
from pipelines.archive.paths import SourceError
from pipelines.archive.reading import read_bytes
from pipelines.evaluate.measure import overlap
from pipelines.photos.codec import decode
from pipelines.photos.photo import PhotoError
from pipelines.run.folder import Run, stages_of
from pipelines.run.schemas import NO_FACE, OK, WEAK
from pipelines.run.tables import read_stage
from pipelines.stages.crops import as_codes, decode_png, to_tensor
from scol_ops import detection
from scol_ops.models.recognisers import Recogniser

# Of detection in this experiment; changing it makes another cache.
_DETECTOR = {"min_face_size": 20, "min_confidence": 0.9, "max_side": 1600}
Say = Callable[[str], None]


class ExperimentError(ValueError):
    """The run and the photos do not go together, or leave nothing to measure."""


@dataclass(frozen=True, eq=False)
class Spot:
    """Where the face of a photo is: landmarks (5, 2) and box (4,) in its pixels."""

    landmarks: NDArray[np.float32]
    box: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Probe:
    """A protected photo: the face nearest its middle, as the run found it.

    `row`: its rows of align, invert, fuse, tune, attack and strengthen, columns named STAGE.COLUMN; `measures`: its row
    of publish.
    """

    photo_id: str
    person: str
    source_url: str
    saved_url: str
    row: dict[str, Any]
    measures: dict[str, Any]

    @property
    def spot(self) -> Spot:
        return Spot(np.array(self.row["align.landmarks"], np.float32).reshape(5, 2),
                    np.array(self.row["align.box"], np.float32))


def central(boxes: Sequence[Sequence[float]], width: int, height: int) -> int:
    """Index of the box whose centre is nearest the picture's; boxes (n, 4), n > 0."""
    boxes = np.asarray(boxes, np.float64)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 - [(width - 1) / 2, (height - 1) / 2]
    return int(np.argmin((middle**2).sum(1)))


class Faces:
    """Detects and embeds the central face of photos, and remembers both on disk.

    Args:
        judges: the recognisers.
        cache: folder of the memory; None for none.
        detector: finds the faces; its settings are part of the memory's name.
    """

    def __init__(self, judges: Sequence[Recogniser], cache: Path | None) -> None:
        self.judges = judges
        self.detector = detection.FaceDetector("cpu", **_DETECTOR)
        settings = hash_key(detection.weights_fingerprint(), repr(sorted(_DETECTOR.items())))[:16]
        self._files = {name: None if cache is None else cache / f"{name}.parquet" for name in
                       (f"faces-{settings}", *(f"{j.name}-{j.fingerprint}-{settings}" for j in judges))}
        self._detections, *self._embeddings = (_load(file) for file in self._files.values())
        self.computed = 0

    def save(self) -> None:
        """Write what is new in memory to disk; whole files, by renaming."""
        for file, table in zip(self._files.values(), (self._detections, *self._embeddings), strict=True):
            if file is not None:
                _store(file, table)

    def embed(self, photo: SourceRow) -> list[NDArray[np.float32]] | None:
        """Each judge's unit embedding of the central face; None where the photo has no face or cannot be read."""
        key = hash_key(photo.url, photo.size or 0, photo.modified or "")
        known = self._detections.get(key)
        if known is not None and not len(known):
            return None
        if known is not None and all(key in table for table in self._embeddings):
            return [table[key] for table in self._embeddings]
        try:
            pixels = decode(read_bytes(photo.url)).pixels
        except (PhotoError, SourceError):
            self._detections[key] = np.zeros(0, np.float32)
            return None
        spot = self.find(pixels) if known is None else Spot(known[:10].reshape(5, 2), known[10:])
        self._detections[key] = np.zeros(0, np.float32) if spot is None else np.concatenate(
            [spot.landmarks.reshape(-1), spot.box])
        if spot is None:
            return None
        self.computed += 1
        for table, embedding in zip(self._embeddings, self.embed_at(pixels, spot), strict=True):
            table[key] = embedding
        return [table[key] for table in self._embeddings]

    def find(self, pixels: NDArray[np.uint8], near: NDArray | None = None) -> Spot | None:
        """The central face, or with `near` the one that overlaps that box most (by 0.2 at least)."""
        faces = self.detector.detect([np.ascontiguousarray(pixels)])[0]
        if near is not None:
            faces = [f for f in faces if overlap(np.asarray(f.box, np.float64), np.asarray(near, np.float64)) >= 0.2]
            faces.sort(key=lambda f: -overlap(np.asarray(f.box, np.float64), np.asarray(near, np.float64)))
            return Spot(faces[0].landmarks, faces[0].box) if faces else None
        if not faces:
            return None
        face = faces[central([f.box for f in faces], pixels.shape[1], pixels.shape[0])]
        return Spot(face.landmarks, face.box)

    def embed_at(self, pixels: NDArray[np.uint8], spot: Spot) -> list[NDArray[np.float32]]:
        """Each judge's unit embedding of the face there."""
        landmarks, box = torch.from_numpy(spot.landmarks)[None], torch.from_numpy(spot.box)[None]
        with torch.no_grad():
            return [judge.embed_photo(to_tensor(pixels), landmarks, box)[0].numpy() for judge in self.judges]


def _load(file: Path | None) -> dict[str, NDArray[np.float32]]:
    if file is None or not file.exists():
        return {}
    table = pq.ParquetFile(file).read(use_threads=False)
    values = (np.array(v, np.float32) for v in table["value"].to_pylist())
    return dict(zip(table["key"].to_pylist(), values, strict=True))


def _store(file: Path, table: dict[str, NDArray[np.float32]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    values = pa.array(list(table.values()), pa.list_(pa.float32()))
    with replacing(file) as temporary:
        pq.write_table(pa.table({"key": list(table), "value": values}), temporary)


_COLUMNS = {
    "align": ["width", "height", "box", "landmarks", "quad"],
    "publish": ["status", "out_path", "psnr", "ssim", "flip", "face_psnr"],
}
_CROPS = {"align": ["crop"], "invert": ["code"], "fuse": ["fused", "target"], "tune": ["tuned", "refined"],
          "attack": ["protected"], "strengthen": ["protected"]}


def read_probes(run: Run, stages: bool = False) -> tuple[list[Probe], dict[str, int]]:
    """The run's protected photos, by path, and how many came to what.

    Args:
        run: a run whose photos have a person: by `person_id`, else by their folder.
        stages: also read crops and codes of every stage.

    Raises:
        RunError: not a run; ExperimentError: it has protected nothing, or its photos have no person.
    """
    source_rows = read_stage(run, "source", ["photo_id", "path", "url", "person_id"]).to_pylist()
    source = {row["photo_id"]: row for row in source_rows}
    published: dict[str, list[dict[str, Any]]] = {}
    for row in read_stage(run, "publish", ["photo_id", "face_id", *_COLUMNS["publish"]]).to_pylist():
        published.setdefault(row["photo_id"], []).append(row)
    aligned: dict[str, list[dict[str, Any]]] = {}
    for row in read_stage(run, "align", ["photo_id", "face_id", *_COLUMNS["align"]]).to_pylist():
        if row["face_id"] and row["box"] is not None:
            aligned.setdefault(row["photo_id"], []).append(row)
    counts = {"photos": run.plan().num_rows, "protected": 0, "weak": 0, "no_face": 0, "failed": 0}
    chosen: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
    for photo_id, rows in published.items():
        if all(r["status"] == NO_FACE for r in rows):
            counts["no_face"] += 1
        elif not all(r["status"] in (OK, WEAK) for r in rows) or photo_id not in aligned:
            counts["failed"] += 1
        else:
            faces = aligned[photo_id]
            face = faces[central([f["box"] for f in faces], faces[0]["width"], faces[0]["height"])]
            result = next(r for r in rows if r["face_id"] == face["face_id"])
            counts["protected"] += 1
            counts["weak"] += result["status"] == WEAK
            chosen.append((source[photo_id], face, result))
    if not chosen:
        raise ExperimentError(f"{run.url}: the run has published no protected photo")
    chosen.sort(key=lambda c: c[0]["path"])
    wanted = {face["face_id"] for _, face, _ in chosen}
    extra: dict[str, dict[str, Any]] = {face: {} for face in wanted}
    if stages:
        there = stages_of(run.plan())
        for stage, columns in ((s, c) for s, c in _CROPS.items() if s in there):
            for row in read_stage(run, stage, ["face_id", *columns]).to_pylist():
                if row["face_id"] in wanted:
                    extra[row["face_id"]] |= {f"{stage}.{c}": row[c] for c in columns}
        if "strengthen" in there:  # null where the loop kept what the attack left
            for row in extra.values():
                row["strengthen.protected"] = row.get("strengthen.protected") or row.get("attack.protected")
    probes = []
    for photo, face, result in chosen:
        person = photo["person_id"] or (photo["path"].split("/")[-2] if "/" in photo["path"] else None)
        if person is None:
            raise ExperimentError(f"{photo['path']}: no person: neither person_id nor a folder")
        row = {f"align.{c}": face[c] for c in _COLUMNS["align"]} | extra[face["face_id"]]
        probes.append(Probe(photo["photo_id"], person, photo["url"], result["out_path"], row, result))
    return probes, counts


def stage_pictures(probe: Probe, generator: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
    """A face's crop (1, 3, S, S) after each stage of `VARIANTS` that the manifests have it for.

    The inverted and the fused picture are drawn from their codes by the pristine generator.
    """
    row = probe.row
    out = {"original": decode_png(row["align.crop"])}
    with torch.no_grad():
        for name, column in (("inverted", "invert.code"), ("fused", "fuse.fused")):
            if generator is not None and row.get(column) is not None:
                out[name] = generator(as_codes(row[column])).clamp(-1, 1)
    for name, column in (("tuned", "tune.tuned"), ("refined", "tune.refined"), ("attacked", "attack.protected"),
                         ("strengthened", "strengthen.protected")):
        if row.get(column) is not None:
            out[name] = decode_png(row[column])
    return out
