"""How well a finished run hides people from recognisers, the way the paper's Table 1 asks: Rank-1-U on LFW.

    python -m pipelines.experiments.lfw RUN --photos lfw-dev [--distractors 1000] [--judge NAME ...] [--stages]

Any tree will do that has a folder for each person, LFW's layout.  For each person of whom the run protected a photo,
one OTHER photo of the same person (the mate, never protected) goes into the gallery, with one photo each of other
people (the distractors).  The probe is the saved file: the face is detected in it anew, as anybody would who wants to
know who it is, and aligned as each recogniser wants it.  Of photos that show several faces the one nearest the middle
counts (LFW's convention).

Printed for each judge: cosine of the probe to its own original and to its mate, the share of probes still accepted as
the mate's person at the recogniser's threshold, and Rank-1-U, each for the protected and for the unprotected photos.
`--stages` adds a table of what each stage contributes, from the crops and codes in the manifests.  Detections and
embeddings of the gallery are kept under build/lfw by fingerprint, so that the next run needs only its own probes.
Writes build/bench/lfw.json and, beside it, the tables as Markdown.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
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
from pipelines import models
from pipelines.config import GENERATORS, RECOGNISERS
from pipelines.evaluate.job import inside_of
from pipelines.evaluate.measure import overlap
from pipelines.files import replacing
from pipelines.machine import machine
from pipelines.manifests import NO_FACE, OK, WEAK, Run, RunError, read_stage, stages_of, to_json
from pipelines.photo import PhotoError, decode
from pipelines.sources import SourceError, SourceRow, list_photos, read_bytes
from pipelines.stages.common import as_codes, decode_png, geometry_in_crop, to_tensor
from scol_ops import detection
from scol_ops.metrics import flip, ism, psnr, rank1_matches, ssim, to_uint8
from scol_ops.models.recognisers import Recogniser, load_recogniser
from scol_ops.paste import face_mask
from scol_ops.runtime import set_up

VARIANTS = ("original", "inverted", "fused", "tuned", "refined", "attacked", "strengthened")
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


# ---- photos and faces ------------------------------------------------------------------------------------------------


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


# ---- the run ---------------------------------------------------------------------------------------------------------

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


# ---- the gallery -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GalleryPhotos:
    """Unprotected photos: for each judge (n, dim) embeddings, and n people; `mates`: person -> row."""

    embeddings: list[NDArray[np.float32]]
    people: list[str]
    mates: dict[str, int]
    distractors: int
    photos_without_face: int


def choose_gallery(
    photos: Iterable[SourceRow], run_photos: set[str], people: Sequence[str], distractors: int, faces: Faces, seed: int,
    say: Say,
) -> GalleryPhotos:
    """One photo of each protected person that the run did not protect, and one each of other people.

    Args:
        photos: the tree; a photo's person is its folder.
        run_photos: paths of the run's photos: none of them is taken.
        people: the protected people.
        distractors: most other people; fewer where the tree has fewer.
        faces: embeds.
        seed: of the choice. A photo without a face is passed over for the next.

    Raises:
        ExperimentError: the tree has no other people.
    """
    by_person: dict[str, list[SourceRow]] = {}
    for photo in photos:
        if photo.error is None and photo.person_id and photo.path not in run_photos:
            by_person.setdefault(photo.person_id, []).append(photo)
    protected = set(people)
    rng = random.Random(seed)
    others = sorted(set(by_person) - protected)
    rng.shuffle(others)
    embeddings: list[list[NDArray[np.float32]]] = [[] for _ in faces.judges]
    names: list[str] = []
    without, begin = 0, time.monotonic()

    def add(person: str) -> bool:
        nonlocal without
        for photo in random.Random(f"{seed}/{person}").sample(by_person[person], len(by_person[person])):
            found = faces.embed(photo)
            if found is not None:
                for rows, row in zip(embeddings, found, strict=True):
                    rows.append(row)
                names.append(person)
                if len(names) % 100 == 0:
                    say(f"gallery: {len(names)} photos, {time.monotonic() - begin:.0f} s")
                return True
            without += 1
        return False

    mates = {person: len(names) - 1 for person in sorted(protected & set(by_person)) if add(person)}
    count = 0
    for person in others:
        if count >= distractors:
            break
        count += add(person)
    if not count:
        raise ExperimentError("the photos have no people beside the run's: no distractors")
    return GalleryPhotos([np.stack(rows) for rows in embeddings], names, mates, count, without)


# ---- tables ----------------------------------------------------------------------------------------------------------


def _mean(values: Iterable[float]) -> float | None:
    values = [v for v in values if v is not None and np.isfinite(v)]
    return float(np.mean(values)) if values else None


def score(
    probes: NDArray[np.float32], originals: NDArray[np.float32], people: Sequence[str], gallery: NDArray[np.float32],
    gallery_people: Sequence[str], mates: dict[str, int], threshold: float,
) -> dict[str, float | int | None]:
    """A judge's figures for probes (n, dim) whose originals are (n, dim): see the module's text.

    Returns:
        `probes`, `with_mate`: counts; `own`, `mate`: mean cosines to the own original and to the mate; `own_accepted`,
        `mate_accepted`: shares above the threshold; `rank1_u`: share whose top candidate is another person. The last
        four of the mate are over probes that have one, None where none has.
    """
    own = ism(originals, probes)
    rows = [i for i, person in enumerate(people) if person in mates]
    out: dict[str, float | int | None] = {
        "probes": len(probes), "with_mate": len(rows), "own": float(own.mean()),
        "own_accepted": float((own > threshold).mean()), "mate": None, "mate_accepted": None, "rank1_u": None,
    }
    if rows:
        mate = ism(gallery[[mates[people[i]] for i in rows]], probes[rows])
        matches = rank1_matches(probes[rows], [people[i] for i in rows], gallery, gallery_people)
        out |= {"mate": float(mate.mean()), "mate_accepted": float((mate > threshold).mean()),
                "rank1_u": float(1 - matches.mean())}
    return out


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


def stage_table(
    probes: Sequence[Probe], gallery: GalleryPhotos, judges: Sequence[Recogniser],
    generator: Callable[[Tensor], Tensor] | None, say: Say,
) -> list[dict[str, Any]]:
    """What each stage contributes: picture measures over the crop, and each judge's `score`."""
    found: dict[str, dict[str, list]] = {
        name: {"who": [], "psnr": [], "ssim": [], "flip": [], **{j.name: [] for j in judges}} for name in VARIANTS
    }
    for number, probe in enumerate(probes):
        pictures = stage_pictures(probe, generator)
        size = pictures["original"].shape[-1]
        landmarks, box = geometry_in_crop(probe.row, size, torch.device("cpu"), "align.")
        mask = face_mask(landmarks, size)[0, 0].numpy() > 0.5
        original = to_uint8(pictures["original"][0])
        for name, picture in pictures.items():
            entry, pixels = found[name], to_uint8(picture[0])
            entry["who"].append(number)
            if name != "original":
                entry["psnr"].append(psnr(original, pixels))
                entry["ssim"].append(ssim(original, pixels))
                entry["flip"].append(flip(original, pixels, mask))
            with torch.no_grad():
                for judge in judges:
                    entry[judge.name].append(judge.embed_crops(to_tensor(pixels), landmarks, box)[0].numpy())
        if (number + 1) % 16 == 0:
            say(f"stages: {number + 1} of {len(probes)} faces")
    table = []
    for name in VARIANTS:
        entry = found[name]
        if not entry["who"]:
            continue
        line: dict[str, Any] = {"stage": name, "faces": len(entry["who"]), "psnr": _mean(entry["psnr"]),
                                "ssim": _mean(entry["ssim"]), "flip": _mean(entry["flip"]), "judges": {}}
        for column, judge in enumerate(judges):
            originals = np.stack(found["original"][judge.name])[entry["who"]]
            line["judges"][judge.name] = score(
                np.stack(entry[judge.name]), originals, [probes[i].person for i in entry["who"]],
                gallery.embeddings[column], gallery.people, gallery.mates, judge.threshold)
        table.append(line)
    return table


def run_experiment(
    run_url: str, photos: str | None = None, *, distractors: int = 1000, judges: Sequence[str] = (), seed: int = 0,
    stages: bool = False, cache: str | os.PathLike[str] | None = "build/lfw", say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measure a finished run; see the module's text.

    Args:
        run_url: the run's folder.
        photos: the tree that its photos come from; None for the run's own source.
        distractors: most other people in the gallery.
        judges: recognisers; by default those that the method did not use.
        seed: of mates and distractors.
        stages: also the table by stage.
        cache: folder for detections and embeddings of the gallery; None for none.
        say: takes progress, one line each.

    Returns:
        what goes to the JSON file.

    Raises:
        RunError, StoreError: no run, or an unreadable one. SourceError: photos that cannot be listed.
        ExperimentError: nothing to measure. ValueError: an unknown judge.
    """
    begin = time.monotonic()
    run = Run(run_url)
    info = run.read_json("run.json")
    probes, counts = read_probes(run, stages)
    inside = inside_of(info["config"])
    names = list(judges) or [name for name in RECOGNISERS if name not in inside]
    if not names:
        raise ExperimentError("the method used every recogniser; name one with --judge, knowing that it proves little")
    networks = [load_recogniser(name) for name in names]
    faces = Faces(networks, None if cache is None else Path(cache))
    paths = set(run.plan()["path"].to_pylist())
    listed = [row for row in list_photos(photos or info["source"], people_from="folder") if not row.skipped]
    missing = paths - {row.path for row in listed}
    if len(missing) == len(paths):
        raise ExperimentError(f"none of the run's photos is below {photos or info['source']}")
    people = [probe.person for probe in probes]
    try:
        gallery = choose_gallery(listed, paths, people, distractors, faces, seed, say)
    finally:
        faces.save()
    say(f"gallery of {len(gallery.people)} people, {faces.computed} photos embedded anew")

    before, after = [[] for _ in networks], [[] for _ in networks]
    kept: list[Probe] = []
    unreadable = undetected = 0
    for number, probe in enumerate(probes):
        try:
            original = decode(read_bytes(probe.source_url)).pixels
            saved = decode(read_bytes(probe.saved_url)).pixels
        except (PhotoError, SourceError) as error:
            say(f"left out: {probe.photo_id}: {error}")
            unreadable += 1
            continue
        kept.append(probe)
        spot = faces.find(saved, near=probe.spot.box)
        undetected += spot is None
        for rows, row in zip(before, faces.embed_at(original, probe.spot), strict=True):
            rows.append(row)
        for rows, row in zip(after, faces.embed_at(saved, spot or probe.spot), strict=True):
            rows.append(row)
        if (number + 1) % 32 == 0:
            say(f"probes: {number + 1} of {len(probes)}")
    if not kept:
        raise ExperimentError("no probe could be read: neither the originals nor the saved files may have moved")
    people = [probe.person for probe in kept]
    table = []
    for column, judge in enumerate(networks):
        original, protected = np.stack(before[column]), np.stack(after[column])
        rest = (people, gallery.embeddings[column], gallery.people, gallery.mates, judge.threshold)
        table.append({
            "judge": judge.name, "fingerprint": judge.fingerprint, "threshold": judge.threshold,
            "inside_method": judge.name in inside,
            "unprotected": score(original, original, *rest), "protected": score(protected, original, *rest),
        })
    quality = {name: {"mean": _mean(p.measures[name] for p in kept),
                      "min": min((p.measures[name] for p in kept if p.measures[name] is not None), default=None),
                      "max": max((p.measures[name] for p in kept if p.measures[name] is not None), default=None)}
               for name in ("psnr", "ssim", "flip", "face_psnr")}
    result: dict[str, Any] = {
        "experiment": "lfw", "run": run.url, "photos": str(photos or info["source"]), "seed": seed,
        "counts": counts | {
            "probes": len(kept), "people": len(set(people)), "unreadable": unreadable,
            "face_not_detected_in_saved": undetected,
            "people_without_another_photo": len(set(people) - set(gallery.mates)),
            "distractors": gallery.distractors, "gallery": len(gallery.people),
            "gallery_photos_without_face": gallery.photos_without_face, "run_photos_not_in_tree": len(missing),
        },
        "quality": quality, "judges": table, "config": info["config"], "weights": info.get("weights"),
        "machine": machine(),
    }
    if stages:
        name = info["config"]["generator"]
        if name not in GENERATORS:
            raise ExperimentError(f"the run used the generator {name!r}, which this version does not have")
        generator = models.generator(name, torch.device("cpu"))
        result["stages"] = stage_table(kept, gallery, networks, generator, say)
    result["seconds"] = round(time.monotonic() - begin, 1)
    return result


# ---- words -----------------------------------------------------------------------------------------------------------


def _cell(value: float | None, digits: int = 3, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|",
            *("| " + " | ".join(row) + " |" for row in rows)]


def to_markdown(result: dict[str, Any]) -> str:
    """The experiment's tables, with what they are over."""
    c, q = result["counts"], result["quality"]
    lines = [
        f"{c['probes']} protected photos of {c['people']} people ({c['photos']} in the run: {c['no_face']} without a "
        f"face, {c['failed']} failed). Gallery: {c['gallery']} photos, one a person, {c['distractors']} of them of "
        f"other people; {c['people_without_another_photo']} people have no other photo and count only in the cosine to "
        "the original.",
        "",
        f"Over the face crop of the saved files: PSNR {_cell(q['psnr']['mean'], 2)} dB (least "
        f"{_cell(q['psnr']['min'], 2)}), SSIM {_cell(q['ssim']['mean'])}, FLIP over the face "
        f"{_cell(q['flip']['mean'])}.",
        "",
    ]
    rows = []
    for entry in result["judges"]:
        name = entry["judge"] + (" (used inside: proves nothing)" if entry["inside_method"] else "")
        for which in ("unprotected", "protected"):
            s = entry[which]
            rows.append((name, which, _cell(s["own"]), _cell(s["own_accepted"], 1, 100), _cell(s["mate"]),
                         _cell(s["mate_accepted"], 1, 100), _cell(s["rank1_u"], 1, 100)))
    lines += _table(("judge", "photos", "cosine to the original", "accepted as it, %", "cosine to another photo",
                     "accepted as it, %", "Rank-1-U, %"), rows)
    for judge in [entry["judge"] for entry in result["judges"]] if result.get("stages") else ():
        lines += ["", f"By stage, judged by {judge} (aligned crops, before paste-back and saving):", ""]
        lines += _table(
            ("after", "faces", "PSNR, dB", "SSIM", "FLIP", "cosine to the original", "cosine to another photo",
             "accepted as it, %", "Rank-1-U, %"),
            ((line["stage"], str(line["faces"]), _cell(line["psnr"], 2), _cell(line["ssim"]), _cell(line["flip"]),
              _cell(s["own"]), _cell(s["mate"]), _cell(s["mate_accepted"], 1, 100), _cell(s["rank1_u"], 1, 100))
             for line in result["stages"] for s in [line["judges"][judge]]))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 where there is nothing to measure."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.experiments.lfw", description=__doc__.split("\n")[0])
    parser.add_argument("run", help="folder of a finished run of scol protect")
    parser.add_argument("--photos", help="tree with a folder for each person [default: the run's own source]")
    parser.add_argument("--distractors", type=int, default=1000, help="other people in the gallery [default: 1000]")
    parser.add_argument("--judge", action="append", default=[], choices=RECOGNISERS, dest="judges",
                        help="recogniser; repeatable [default: those that the method did not use]")
    parser.add_argument("--stages", action="store_true", help="also a table of what each stage contributes")
    parser.add_argument("--seed", type=int, default=0, help="of mates and distractors [default: 0]")
    parser.add_argument("--threads", type=int, help="PyTorch threads [default: all cores]")
    parser.add_argument("--cache", default="build/lfw", help="folder for the gallery's embeddings [default: build/lfw]")
    parser.add_argument("--json", default="build/bench/lfw.json",
                        help="where the figures go [default: build/bench/lfw.json]")
    options = parser.parse_args(argv)
    if options.distractors < 1:
        parser.error("--distractors must be at least 1")
    set_up(options.threads)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        result = run_experiment(
            options.run, options.photos, distractors=options.distractors, judges=options.judges, seed=options.seed,
            stages=options.stages, cache=options.cache, say=say)
    except (ExperimentError, RunError, SourceError) as error:
        say(f"error: {error}")
        return 2
    text = to_markdown(result)
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(result) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    say(f"written: {path} and {path.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
