"""People that a method of ours has protected: pictures and measures of each, for the figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cluster import Progress
from pipelines.archive.reading import read_bytes
from pipelines.config.load import load_config
from pipelines.config.sections import Config
from pipelines.evaluate import judges
from pipelines.evaluate.errors import EvaluateError
from pipelines.evaluate.measure import column
from pipelines.evaluate.stages import Probe, read_probes
from pipelines.experiments.comparison import DISTORTION, JOD_HEAD, PICTURES, PICTURES_HEAD, Line, compare
from pipelines.experiments.faces import COLUMNS, Faces, estimates, jod_cells, mean, read_faces
from pipelines.experiments.methods import Method
from pipelines.experiments.sheet import Pixels
from pipelines.experiments.tables import ExperimentError, Options
from pipelines.photos.codec import decode
from pipelines.run.folder import Run
from pipelines.run.text_tables import estimate, number
from pipelines.stages.crops import decode_png
from scol_ops.alignment import align_crops
from scol_ops.distortions import NONE
from scol_ops.metrics import to_uint8

Say = Callable[[str], None]
Reporting = Callable[[], Callable[[Progress], None] | None]


@dataclass(frozen=True)
class Place:
    """Where an experiment works, and on what. `name`: of the figure; `references`: people of the gallery at most."""

    name: str
    out: Path
    originals: Path
    gallery: Path
    references: int
    options: Options
    say: Say
    progress: Reporting


@dataclass(frozen=True)
class Subject:
    """A method's result. `probes`: photos that were protected, by path below the originals."""

    line: Line
    probes: dict[str, Probe]
    run: Run
    file: Path

    def faces(self, names: Sequence[str], subject: str = "") -> Faces:
        """Measures, the mean over recognisers."""
        return mean([read_faces(self.file, name, subject) for name in names])


def protect(place: Place, method: Method) -> Subject:
    """Protect and evaluate, or go on; the run's folder is shared by all methods of a place."""
    run = place.out / "run"
    (line,) = compare(
        [method],
        place.originals,
        place.gallery,
        place.out,
        references=place.references,
        workers=place.options.workers,
        seed=place.options.seed,
        say=place.say,
        progress=place.progress,
        run_url=str(run),
    )
    try:
        probes = {probe.path: probe for probe in read_probes(Run(str(run)))}
    except EvaluateError as error:
        raise ExperimentError(f"{method.name}: {error}; {line.made.failed}") from error
    return Subject(line, probes, Run(str(run)), place.out / "evaluations" / method.name / "faces.parquet")


def outside(*subjects: Subject) -> list[str]:
    """Recognisers that none of these used.

    Raises:
        ExperimentError: there is none.
    """
    found = [name for name in judges.available() if not any(name in s.line.method.used for s in subjects)]
    if not found:
        raise ExperimentError("every recogniser is inside: nobody is left to judge (--set tune.identity=...)")
    return found


def common(*subjects: Subject) -> list[str]:
    """Paths that all of them protected and measured.

    Raises:
        ExperimentError: there is none.
    """
    name = judges.available()[0]
    sets = [set(s.probes) & set(read_faces(s.file, name)) for s in subjects]
    found = sorted(set.intersection(*sets))
    if not found:
        raise ExperimentError("no face was protected and measured")
    return found


def person_of(path: str) -> str:
    return path.split("/")[-2]


def lost(place: Place, shown: Sequence[str], *subjects: Subject) -> str:
    """How many photos have numbers, and why the others have none."""
    photos = sum(1 for p in place.originals.rglob("*") if p.is_file())
    words = f"{len(shown)} of {photos} photos have numbers"
    if len(shown) == photos:
        return words + "."
    reasons: Counter[str] = Counter()
    for subject in subjects:
        reasons.update({code: int(n) for code, n in subject.line.made.failed.items() if not code.startswith("WEAK")})
    named = f" ({', '.join(f'{code} {n}' for code, n in sorted(reasons.items()))})" if reasons else ""
    return f"{words}; the others were not protected, or their face was not found again{named}."


# Lines of ours that several figures have: with one OUT each is made once.
PLAIN, ATTACKED, RANDOM = "plain", "attacked", "random-code"
_SETS = {
    PLAIN: ("attack.enabled=false",),
    ATTACKED: ("attack.enabled=true",),
    RANDOM: ("attack.enabled=false", "fuse.source=random"),
}


def ours(name: str, options: Options) -> Method:
    return Method(name, "ours", profile=options.profile, sets=(*options.sets, *_SETS[name]))


def as_configured(options: Options) -> Method:
    """With the attack, if the profile and `--set` say so."""
    return ours(ATTACKED if load_config(options.profile, sets=options.sets).attack.enabled else PLAIN, options)


_LATER = (f"Rank-1-U after {DISTORTION}, %", "ISM after it")
HEAD = ("", "faces", "Rank-1-U, %", "ISM", *JOD_HEAD, *PICTURES_HEAD, *_LATER)


def summary(name: str, faces: Faces, paths: Sequence[str], pictures: bool = True) -> tuple[str, ...]:
    """A line of a table with the columns of `HEAD`."""
    some = {path: faces[path] for path in paths if path in faces}
    found = estimates(some)

    def identity(seen: str) -> tuple[str, str]:
        return estimate(found[column("rank1_u", "", seen)], 1, 100), estimate(found[column("ism", "", seen)])

    cells = [*(jod_cells(some) if pictures else ("-", "-"))]
    cells += [estimate(found[m], d) if pictures else "-" for m, d in PICTURES]
    return (name, str(len(some)), *identity(NONE), *cells, *identity(DISTORTION))


def one_face(faces: Faces, path: str) -> dict[str, float | None]:
    """A face's measures by column, for the JSON file."""
    if path not in faces:
        return {}
    return {column(m, "", seen): _known(v) for (m, seen), v in zip(COLUMNS, faces[path], strict=True)}


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def original_crop(probe: Probe) -> Pixels:
    return to_uint8(decode_png(probe.row["align.crop"])[0])


def saved_crop(probe: Probe, size: int) -> Pixels:
    """The face's place in the saved file, uint8 (size, size, 3)."""
    quad = torch.from_numpy(np.array(probe.row["align.quad"], np.float64).reshape(1, 4, 2))
    return to_uint8(align_crops(decode(read_bytes(probe.saved_url)).pixels, quad, size)[0])


def configuration(subject: Subject) -> Config:
    return load_config(subject.line.method.profile, sets=subject.line.method.sets)


def face_words(faces: Faces, path: str) -> tuple[str, str]:
    """Below a protected face."""
    found = one_face(faces, path)
    return f"ISM {number(found.get('ism'), 3)}", f"JOD {number(found.get('jod'), 2)}"
