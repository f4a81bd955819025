"""The paper's figures as named experiments: `scol experiment run figure-NAME`.

Each protects the people of a protocol, as the tables do, and shows them with the numbers behind the pictures: a page
(OUT/NAME.html), a sheet (OUT/NAME.png), tables (OUT/NAME.md) and everything as data (OUT/NAME.json).  Numbers are those
of `scol evaluate` by recognisers that no line used, unless they say otherwise.  What is finished is not made again;
figures with one OUT share it.  Photos of people are written to OUT alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster import ray_session
from pipelines.archive.listing import list_source, source_table
from pipelines.archive.reading import read_bytes
from pipelines.config.load import load_config
from pipelines.config.sections import Config
from pipelines.evaluate import judges
from pipelines.evaluate.measure import CROP, UNPROTECTED, Eyes, Gallery, Window, central, central_window, nearest
from pipelines.evaluate.stages import Probe, stage_pictures
from pipelines.experiments import conditions
from pipelines.experiments.comparison import DISTORTION
from pipelines.experiments.datasets import DatasetPhoto, read_dataset
from pipelines.experiments.protocol import Protocol, choose, lay_out
from pipelines.experiments.sheet import AMPLIFICATION, Cell, Figure, Pixels, Strip, difference, to_html, write_png
from pipelines.experiments.subjects import (
    ATTACKED,
    HEAD,
    PLAIN,
    RANDOM,
    Place,
    Reporting,
    Say,
    as_configured,
    common,
    configuration,
    face_words,
    lost,
    one_face,
    original_crop,
    ours,
    outside,
    person_of,
    protect,
    saved_crop,
    summary,
)  # fmt: skip
from pipelines.experiments.tables import ExperimentError, Options, write
from pipelines.jobs.chain import execute
from pipelines.jobs.run_gallery import RunGallery
from pipelines.networks import load as networks
from pipelines.networks import resolve as resolving
from pipelines.photos.codec import decode, encode
from pipelines.run.environment import machine
from pipelines.run.folder import Run
from pipelines.run.schemas import OK
from pipelines.run.tables import read_stage
from pipelines.run.text_tables import markdown, number
from pipelines.stages.crops import as_codes, decode_png, geometry_in_crop, to_tensor
from scol_ops.alignment import align_crops
from scol_ops.attack import attack_loss
from scol_ops.inspection import Inspection, inspect_components
from scol_ops.metrics import candidate_ranks, ism, psnr, ssim, to_uint8

PEOPLE = 8  # by default
SHOWN = 12  # most people with pictures; numbers are of all
TOP = 5
POOL = 200  # people of whom the hard conditions are picked

CPU = torch.device("cpu")


# ---- retrievals ------------------------------------------------------------------------------------------------------

SUBJECTS = ("original", "fused", "protected")


def figure_retrieval(place: Place) -> Figure:
    """The gallery's faces that are most similar to the original, the fused and the protected face."""
    subject = protect(place, as_configured(place.options))
    names, config = outside(subject), configuration(subject)
    eyes, gallery = Eyes(names), Gallery.read(subject.line.figures["gallery_embedded"], names)
    paths = [path for path in common(subject) if person_of(path) in gallery.people]
    if not paths:
        raise ExperimentError("nobody who was protected is in the gallery")
    generator = networks.generator(config.generator, CPU, config.engine.models)
    face_of = lru_cache(None)(lambda url: gallery_face(eyes, url))
    strips, found = [], []
    for count, path in enumerate(paths):
        person = person_of(path)
        embedded, pictures = retrieval_queries(subject.probes[path], eyes, generator, config.crop_size)
        for index, judge in enumerate(names):
            for name in SUBJECTS:
                cosines = np.clip(gallery.embeddings[index] @ embedded[name][index], -1, 1)
                answer = retrieve(cosines, gallery.people, person)
                found.append({"path": path, "judge": judge, "subject": name, **answer})
                if count < SHOWN:
                    cells = [Cell(pictures[name], (name,))]
                    for one in answer["first"]:
                        face = face_of(gallery.urls[gallery.people.index(one["person"])])
                        right = one["person"] == person
                        words = (f"{one['cosine']:.3f}", "the person" if right else "another")
                        cells.append(Cell(face, words, right))
                    strips.append(Strip(person, tuple(cells), f"{name}, by {judge}"))
    head = ("", "faces", "the person is first, %", f"among the first {TOP}, %", "cosine to the person", "to the first")
    rows = [head]
    for judge in names:
        for name in SUBJECTS:
            some = [f for f in found if f["judge"] == judge and f["subject"] == name]
            ranks = (number(np.mean([f["rank"] <= k for f in some]), 1, 100) for k in (1, TOP))
            own = number(np.mean([f["cosine_to_person"] for f in some]), 3)
            first = number(np.mean([f["first"][0]["cosine"] for f in some]), 3)
            rows.append((f"{name}, by {judge}", str(len(some)), *ranks, own, first))
    notes = (
        f"The {TOP} faces of a gallery of {len(gallery.people)} people that are most similar to a query, by "
        "recognisers that were not used inside; framed and named by whether they are the person. "
        + lost(place, paths, subject),
        "The fused face is what the pristine generator draws from the fused code, before the tuning.",
    )
    numbers = {"gallery_people": len(gallery.people), "retrievals": found}
    return Figure(place.name, TITLES[place.name], notes, (("Retrievals", rows),), tuple(strips), numbers)


def retrieval_queries(
    probe: Probe, eyes: Eyes, generator: Callable[[Tensor], Tensor], size: int
) -> tuple[dict[str, list[NDArray[np.float32]]], dict[str, Pixels]]:
    """By subject: each recogniser's unit embedding (D,), and the picture."""
    spot = probe.spot
    windows = []
    for url in (probe.source_url, probe.saved_url):
        pixels = decode(read_bytes(url)).pixels
        windows.append(Window.about(pixels, nearest(eyes.faces(pixels), spot) or spot))  # found anew, as anybody would
    both = eyes.embed(windows)
    fused = stage_pictures(probe, generator)["fused"]
    landmarks, box = geometry_in_crop(probe.row, size, CPU, "align.")
    with torch.no_grad():
        drawn = [network.embed_crops(fused, landmarks, box)[0].numpy() for network in eyes.networks]
    embedded = {"original": [e[0] for e in both], "fused": drawn, "protected": [e[1] for e in both]}
    shown = (original_crop(probe), to_uint8(fused[0]), saved_crop(probe, size))
    return embedded, dict(zip(SUBJECTS, shown, strict=True))


def retrieve(cosines: NDArray, people: Sequence[str], person: str) -> dict[str, Any]:
    """The first `TOP` people, and the rank of one of them, 1 for the first; ties count as `candidate_ranks` says.

    Args:
        cosines: (N,) of a query to each person of the gallery. people: N names, each once.
    """
    others = np.array([name != person for name in people])
    own = cosines[~others]
    first = np.argsort(-cosines, kind="stable")[:TOP]
    return {
        "person": person,
        "rank": int(candidate_ranks(own, cosines[None], others[None])[0]),
        "cosine_to_person": float(own[0]),
        "first": [{"person": people[row], "cosine": float(cosines[row])} for row in first],
    }


def gallery_face(eyes: Eyes, url: str) -> Pixels | None:
    """The crop of the face in the middle of a gallery's photo."""
    window, _ = central_window(eyes, url)
    return None if window is None else to_uint8(align_crops(window.pixels, window.spot.quad, CROP)[0])


# ---- fused against random code ---------------------------------------------------------------------------------------


_CODES = {"fused": PLAIN, "random": RANDOM}
# Before saving: stage, measure, its name, digits.
_STAGES = {"fused": "code's picture", "tuned": "tuned"}
_MEASURES = (("ism", "ISM", 3), ("psnr", "PSNR, dB", 2), ("ssim", "SSIM", 3))
_EARLY = tuple((stage, *measure) for stage, few in (("fused", 2), ("tuned", 3)) for measure in _MEASURES[:few])


def figure_random_code(place: Place) -> Figure:
    """Tuning from the fused code against tuning from a code drawn at random."""
    subjects = {name: protect(place, ours(line, place.options)) for name, line in _CODES.items()}
    names, paths = outside(*subjects.values()), common(*subjects.values())
    config = configuration(subjects["fused"])
    generator = networks.generator(config.generator, CPU, config.engine.models)
    recognisers = [judges.load(name) for name in names]
    faces = {name: subject.faces(names) for name, subject in subjects.items()}
    strips, found, tuned = [], {}, {name: [] for name in subjects}
    for count, path in enumerate(paths):
        cells, numbers = [Cell(original_crop(subjects["fused"].probes[path]), ("original",))], {}
        for name, subject in subjects.items():
            probe = subject.probes[path]
            pictures = stage_pictures(probe, generator)
            crops = {stage: to_uint8(picture[0]) for stage, picture in pictures.items()}
            code, own = (crop_measures(probe, crops["original"], crops[s], recognisers) for s in ("fused", "tuned"))
            tuned[name].append({"fused": code, "tuned": own})
            numbers[name] = {"code": code, "tuned": own, "saved": one_face(faces[name], path)}
            saved = saved_crop(probe, len(crops["original"]))
            cells += [
                Cell(crops["fused"], (f"{name} code", f"ISM {code['ism']:.3f}")),
                Cell(saved, ("protected", *face_words(faces[name], path))),
                Cell(difference(crops["original"], saved), (f"change x {AMPLIFICATION}",)),
            ]
        found[path] = numbers
        if count < SHOWN:
            strips.append(Strip(person_of(path), tuple(cells)))
    rows = [("", "faces", *(f"{_STAGES[stage]}: {name}" for stage, _, name, _ in _EARLY))]
    for name, some in tuned.items():
        means = (number(np.mean([s[stage][m] for s in some]), digits) for stage, m, _, digits in _EARLY)
        rows.append((f"{name} code", str(len(some)), *means))
    saved_rows = [HEAD, *(summary(f"{name} code", faces[name], paths) for name in subjects)]
    notes = (
        "The same face, tuned from the fused code (of the most similar codes of other people) and from one code of the "
        "gallery that the face's seed draws; all other settings are the same. "
        + lost(place, paths, *subjects.values()),
        f"ISM: cosine to the original, mean over {', '.join(names)}, which were not used inside.",
    )
    tables = (("Before saving, over the crop", rows), ("The saved photo", saved_rows))
    return Figure(place.name, TITLES[place.name], notes, tables, tuple(strips), {"judges": names, "faces": found})


def crop_measures(probe: Probe, original: Pixels, picture: Pixels, networks: Sequence[Any]) -> dict[str, float]:
    """`psnr`, `ssim` and the recognisers' mean `ism` of a crop, uint8 (S, S, 3), against the original's."""
    landmarks, box = geometry_in_crop(probe.row, len(original), CPU, "align.")
    with torch.no_grad():
        cosines = [
            float(ism(*(network.embed_crops(to_tensor(p), landmarks, box) for p in (original, picture)))[0])
            for network in networks
        ]
    return {"psnr": psnr(original, picture), "ssim": ssim(original, picture), "ism": float(np.mean(cosines))}


# ---- with and without the attack -------------------------------------------------------------------------------------


_ATTACKS = {"without": PLAIN, "with": ATTACKED}


def figure_attack(place: Place) -> Figure:
    """The protected face without and with the identity inversion attack."""
    subjects = {name: protect(place, ours(line, place.options)) for name, line in _ATTACKS.items()}
    names, paths = outside(*subjects.values()), common(*subjects.values())
    config = configuration(subjects["with"])
    encoder = networks.encoder(CPU, config.encoder, config.engine.models)
    scale = component_scale(config, subjects["with"].run, place.say)
    faces = {name: subject.faces(names) for name, subject in subjects.items()}
    strips, found = [], {}
    for count, path in enumerate(paths):
        probe = subjects["with"].probes[path]
        original = original_crop(probe)
        inspection = inspected(probe, config, scale)
        distances = {"original": distance(encoder, original, inspection)}
        cells = [Cell(original, ("original", f"distance {distances['original']:.3f}"))]
        numbers: dict[str, Any] = {"components": float(inspection.share[0])}
        for name, subject in subjects.items():
            saved = saved_crop(subject.probes[path], len(original))
            distances[name] = distance(encoder, saved, inspection)
            words = (f"{name} attack", *face_words(faces[name], path), f"distance {distances[name]:.3f}")
            cells += [Cell(saved, words), Cell(difference(original, saved), (f"change x {AMPLIFICATION}",))]
            numbers[name] = one_face(faces[name], path)
        found[path] = numbers | {"distance_to_target": distances}
        if count < SHOWN:
            strips.append(Strip(person_of(path), tuple(cells)))
    rows = [("", "faces", "distance to the attack's target")]
    for name in ("original", *subjects):
        values = [f["distance_to_target"][name] for f in found.values()]
        words = name if name == "original" else f"{name} attack"
        rows.append((words, str(len(values)), number(np.mean(values), 4)))
    saved_rows = [HEAD, *(summary(f"{name} attack", faces[name], paths) for name in subjects)]
    notes = (
        "Distance: root mean square, over the components that the inspection found to carry identity, between the "
        "encoder's code of the saved face and the attack's target, the least similar codes of the gallery; in the "
        f"code's own numbers. The attack makes it smaller. {lost(place, paths, *subjects.values())}",
        f"ISM: cosine to the original, mean over {', '.join(names)}, which were not used inside. The attack works "
        "through the encoder, and so through the features of its trunk.",
    )
    tables = (("In the code's space", rows), ("The saved photo", saved_rows))
    return Figure(place.name, TITLES[place.name], notes, tables, tuple(strips), {"judges": names, "faces": found})


def component_scale(config: Config, run: Run, say: Say) -> Tensor | None:
    """Units of the inspection's threshold, (L, 512), as the run has them; None for absolute ones."""
    if config.inspect.unit == "absolute":
        return None
    return torch.from_numpy(RunGallery.open(config, run, say).std())


def inspected(probe: Probe, config: Config, scale: Tensor | None) -> Inspection:
    """What the run's attack on this face aimed at."""
    own, target = as_codes(probe.row["invert.code"]), as_codes(probe.row["fuse.target"])
    return inspect_components(own, target, config.inspect.tau, unit=config.inspect.unit, std=scale)


def distance(encoder: Callable[[Tensor], Tensor], picture: Pixels, inspection: Inspection) -> float:
    """Root mean square over the inspected components between a crop's code and the target."""
    with torch.no_grad():
        loss = attack_loss(
            lambda x: encoder(networks.at_encoder_size(x)), to_tensor(picture), inspection.target, inspection.mask
        )
    return float(loss[0].sqrt())


# ---- hard conditions -------------------------------------------------------------------------------------------------


def figure_hard(place: Place) -> Figure:
    """Faces that are turned, dark, flat, lit from a side or covered, beside easy ones."""
    subject = protect(place, as_configured(place.options))
    names, paths = outside(subject), common(subject)
    faces, before = subject.faces(names), subject.faces(names, UNPROTECTED)
    strips, rows, found = [], [HEAD], {}
    for condition in conditions.CONDITIONS:
        every = sorted(
            p.relative_to(place.originals).as_posix() for p in (place.originals / condition).rglob("*") if p.is_file()
        )
        some = [path for path in every if path in paths]
        rows.append(summary(f"{condition}: unprotected", before, some, pictures=False))
        name, photos, *rest = summary(f"{condition}: protected", faces, some)
        rows.append((name, f"{photos} of {len(every)}", *rest))
        for count, path in enumerate(every):
            probe = subject.probes.get(path)
            if path not in some:
                found[path] = {"condition": condition, "lost": True}
                continue
            original, landmarks = original_crop(probe), probe.row["align.landmarks"]
            how = conditions.hardness(np.asarray(landmarks), original)
            own = {m: value for m, value in one_face(before, path).items() if m.startswith(("ism", "rank1_u"))}
            measured = {"hardness": asdict(how), "protected": one_face(faces, path), "unprotected": own}
            found[path] = {"condition": condition} | measured
            if count < SHOWN // 2:
                saved = saved_crop(probe, len(original))
                words = f"yaw {how.yaw:+.2f}\nlight {how.luminance:.2f}"
                words += f"\ncontrast {how.contrast:.2f}\nhalves {how.side:+.2f}"
                cells = (
                    Cell(original, ("original",)),
                    Cell(saved, ("protected", *face_words(faces, path))),
                    Cell(difference(original, saved), (f"change x {AMPLIFICATION}",)),
                )
                strips.append(Strip(f"{condition}: {person_of(path)}", cells, words))
    criteria = [("", "photos", "yaw to either side", "roll, degrees", "luminance", "contrast", "halves")]
    for condition in conditions.CONDITIONS:
        some = [f["hardness"] for f in found.values() if f["condition"] == condition and "hardness" in f]
        measures = ("yaw", "roll", "luminance", "contrast", "side")
        means = (number(np.mean([abs(h[m]) for h in some]) if some else None, 3) for m in measures)
        criteria.append((f"{condition}: {conditions.WORDS[condition]}", str(len(some)), *means))
    notes = (
        "Photos picked by what was measured of their faces: yaw is where the nose lies between the eyes, in distances "
        "of the eyes; luminance and contrast are the mean and the standard deviation of the luma of the face's middle, "
        "0 to 1, and so the light's and the complexion's alike; halves is the difference of its right and left half, "
        "in shares of their sum. The data set does not say whose face is covered, so glasses and masks are drawn over "
        "the easy photos.",
        f"Unprotected: what the condition does by itself; ISM is 1 there before {DISTORTION}. A face that is hard to "
        f"recognise is not one that is protected. {lost(place, paths, subject)}",
    )
    tables = (("How the conditions were picked", criteria), ("What became of them", rows))
    return Figure(place.name, TITLES[place.name], notes, tables, tuple(strips), {"judges": names, "photos": found})


def lay_out_conditions(photos: Sequence[DatasetPhoto], place: Place) -> Place:
    """Pick the photos of each condition among `POOL` people, and put them into folders; returns the place to work at.

    Faces of the pool are found by the run's own first stage, once.

    Raises:
        DatasetError: nobody has two photos.
    """
    options = place.options
    counts = Counter(photo.person for photo in photos)
    several = sum(n > 1 for n in counts.values())
    people = max(1, min(several, max(POOL, 4 * options.people)))
    pool = choose(photos, people, options.distractors, options.seed)
    originals, gallery = lay_out(pool, options.data, place.out / "pool")
    config = load_config(options.profile, sets=options.sets, engine__workers=options.workers)
    config = resolving.resolve(config, place.say)
    run = Run(str(place.out / "pool.run"))
    place.say(f"hard conditions: finding the faces of {people} people")
    source = source_table(list_source(str(originals)).photos)
    execute(run, source, config, until="align", progress=place.progress(), say=place.say)
    by_photo: dict[str, list[dict[str, Any]]] = {}
    paths = dict(zip(*(run.plan()[name].to_pylist() for name in ("photo_id", "path")), strict=True))
    columns = ["photo_id", "status", "box", "landmarks", "width", "height", "crop"]
    for row in read_stage(run, "align", columns).to_pylist():
        if row["status"] == OK and row["box"] is not None:
            by_photo.setdefault(paths[row["photo_id"]], []).append(row)
    landmarks, found = {}, {}
    for path, rows in by_photo.items():
        face = rows[central(np.array([r["box"] for r in rows]), rows[0]["width"], rows[0]["height"])]
        person = person_of(path)
        landmarks[person] = np.asarray(face["landmarks"], np.float64).reshape(5, 2)
        found[person] = conditions.hardness(landmarks[person], to_uint8(decode_png(face["crop"])[0]))
    picked = conditions.pick(found, options.people)
    probes = {f"{c}/{person}": pool.probes[person] for c, some in picked.items() for person in some}
    out = place.out / "hard"
    drawn = {}
    for index, person in enumerate(picked[conditions.COVERED]):
        source = Path(options.data) / pool.probes[person]
        photo = decode(source.read_bytes())
        covered = conditions.cover(photo.pixels, landmarks[person], index)
        drawn[f"{conditions.COVERED}/{person}"] = encode(photo, covered)
    hard, _ = lay_out(Protocol(probes, {}, {}), options.data, out / "photos", drawn)
    return replace(place, out=out, originals=hard, gallery=gallery, references=people + options.distractors)


# ---- running ---------------------------------------------------------------------------------------------------------

TITLES = {
    "figure-retrieval": "Retrievals of the original, the fused and the protected face",
    "figure-random-code": "Tuning from the fused code and from a random one",
    "figure-attack": "With and without the identity inversion attack",
    "figure-hard": "Hard conditions: pose, light, covered faces",
}
_DRAW = dict(zip(TITLES, (figure_retrieval, figure_random_code, figure_attack, figure_hard), strict=True))


def run(name: str, options: Options, say: Say = lambda text: None, progress: Reporting = lambda: None) -> str:
    """Draw a figure, or go on with it; returns its notes and tables (Markdown).

    OUT/NAME.html, .png, .md and .json hold it.

    Args:
        name: of `TITLES`.
        options: `others` and `swaps` are not used.

    Raises:
        ExperimentError: nobody was protected, or nobody is left to judge. DatasetError: the data set is not there.
        Others as `comparison.compare`.
    """
    out = Path(options.out).resolve()
    photos = list(read_dataset(options.dataset, options.data))
    with ray_session():
        if name == "figure-hard":
            place = lay_out_conditions(photos, Place(name, out, out, out, 0, options, say, progress))
        else:
            protocol = choose(photos, options.people, options.distractors, options.seed)
            originals, gallery = lay_out(protocol, options.data, out / "photos")
            people = options.people + options.distractors
            place = Place(name, out, originals, gallery, people, options, say, progress)
        figure = _DRAW[name](place)
    text = "\n\n".join([f"{figure.title}. {figure.notes[0]}", *figure.notes[1:]])
    text += "".join(f"\n\n{caption}:\n\n{markdown(rows)}" for caption, rows in figure.tables)
    about = {"experiment": name, "options": asdict(options), "machine": machine()}
    tables = {caption: [dict(zip(rows[0], row, strict=True)) for row in rows[1:]] for caption, rows in figure.tables}
    write(out, name, text, about | {"tables": tables} | figure.numbers)
    (out / f"{name}.html").write_text(to_html(figure), encoding="utf-8")
    write_png(figure, out / f"{name}.png")
    say(f"written: {out / name}.html, .png, .md and .json")
    return text
