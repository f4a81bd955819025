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
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.archive.entry import SourceRow
from pipelines.archive.paths import SourceError
from pipelines.archive.reading import read_bytes
from pipelines.archive.source import list_photos
from pipelines.config.names import GENERATORS, RECOGNISERS
from pipelines.evaluate.job import inside_of
from pipelines.experiments.probes import ExperimentError, Faces, Probe, Say, read_probes, stage_pictures
from pipelines.photos.codec import decode
from pipelines.photos.photo import PhotoError
from pipelines.run.environment import machine
from pipelines.run.folder import Run, RunError
from pipelines.run.text import to_json
from pipelines.stages.crops import geometry_in_crop, to_tensor
from scol_ops.metrics import flip, ism, psnr, rank1_matches, ssim, to_uint8
from scol_ops.models.embedded import load_recogniser
from scol_ops.models.recognisers import Recogniser
from scol_ops.paste import face_mask
from scol_ops.runtime import set_up

VARIANTS = ("original", "inverted", "fused", "tuned", "refined", "attacked", "strengthened")


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
        generator = networks.generator(name, torch.device("cpu"))
        result["stages"] = stage_table(kept, gallery, networks, generator, say)
    result["seconds"] = round(time.monotonic() - begin, 1)
    return result


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
