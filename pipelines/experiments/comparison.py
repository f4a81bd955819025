"""Several methods on the same people: each makes its tree, each tree is evaluated, and the figures stand side by side.

Everything is resumable: trees, parts and galleries lie in one folder, and what is there is not made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import Progress
from pipelines.evaluate import job, judges
from pipelines.evaluate.summary import AVERAGE, LOST, PROTECTED
from pipelines.experiments.methods import Made, Method, make
from pipelines.run.environment import machine
from pipelines.run.text_tables import estimate, markdown, number
from scol_ops.distortions import NONE

Say = Callable[[str], None]
UNPROTECTED = Method("unprotected", "folder")
DISTORTION = "jpeg75+half"  # after which every table shows the photos again
PICTURES = (("face_psnr", 2), ("face_ssim", 3), ("face_flip", 3))  # measure, decimals
PICTURES_HEAD = ("PSNR of the face, dB", "SSIM of the face", "FLIP of the face")
JOD_HEAD = ("JOD", "JOD, 5 %")


@dataclass(frozen=True)
class Line:
    """A method and what became of it. `figures`: of `scol evaluate`."""

    method: Method
    made: Made
    figures: dict[str, Any]

    def cell(self, recogniser: str = AVERAGE, variant: str = NONE) -> dict[str, Any] | None:
        """Identity measures of the protected photos; None where this recogniser was used by the method."""
        if recogniser in self.method.used:
            return None
        found = self.figures["identity"].get(recogniser)
        return None if found is None else found[PROTECTED][variant]

    def picture(self, measure: str, variant: str = NONE) -> dict[str, Any] | None:
        return self.figures["picture"][measure].get(variant)

    def jod(self, variant: str = NONE) -> tuple[str, str]:
        """Cells of `JOD_HEAD`: the mean and the 5 % quantile, of the file as saved; dashes for another variant."""
        spread = self.figures["distributions"]["jod"] if variant == NONE else {}
        return estimate(self.picture("jod", variant), 2, interval=False), number(spread.get("p5"))

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file: without settings that all lines share."""
        names = ("counts", "inside", "recognisers", "identity", "picture", "distributions")
        return {
            "method": vars(self.method),
            "seconds_per_face": self.made.seconds_per_face,
            "failed": self.made.failed,
            "weak": self.made.weak,
            "strengthened": self.made.strengthened,
            **{name: self.figures[name] for name in names},
        }


def compare(
    methods: Iterable[Method],
    originals: Path,
    gallery: Path,
    folder: Path,
    *,
    references: int,
    recognisers: Sequence[str] | None = None,
    distortions: Sequence[str] = (DISTORTION,),
    workers: int | None = None,
    seed: int = 0,
    say: Say = lambda text: None,
    progress: Callable[[], Callable[[Progress], None] | None] = lambda: None,
    run_url: str | None = None,
) -> list[Line]:
    """Make and evaluate all methods' trees.

    Args:
        methods: in the order of the lines; names differ.
        originals, gallery: of `protocol.lay_out`.
        folder: where trees and evaluations go.
        references, recognisers, distortions, seed: see `scol evaluate`; recognisers None: all that can be had.
        workers: processes of each job.
        say: takes messages. progress: makes a new one for each job.
        run_url: see `make`.

    Raises:
        what `make` and `evaluate` raise.
    """
    recognisers = judges.available() if recognisers is None else recognisers
    lines = []
    for method in methods:
        begin = time.monotonic()
        say(f"{method.name}: protecting")
        if method is UNPROTECTED:
            made = Made(str(originals), None)
        else:
            made = make(
                method, originals, folder / "trees", workers=workers, say=say, progress=progress(), run_url=run_url
            )
        say(f"{method.name}: evaluating")
        options = job.Options(
            str(originals),
            made.tree,
            out=str(folder / "evaluations" / method.name),
            gallery=str(gallery),
            people_from="folder",
            recognisers=recognisers,
            distortions=distortions,
            inside=method.used,
            references=references,
            workers=workers,
            seed=seed,
            work=str(folder / "work"),
        )
        figures = job.evaluate(options, say, progress()).figures
        lines.append(Line(method, made, figures))
        say(f"{method.name}: done in {time.monotonic() - begin:.0f} s")
    return lines


# ---- words -----------------------------------------------------------------------------------------------------------


def lost_faces(lines: Sequence[Line]) -> str:
    """What the lines' figures leave out, as a paragraph of its own: photos that a method lost. Empty where none is."""
    words = []
    for line in lines:
        counts = line.figures["counts"]
        lost = {name.removeprefix("photos_"): counts.get(name, 0) for name in LOST}
        lost["faces that failed"] = counts.get("faces_error", 0)
        told = [f"{count} {key.replace('_', ' ')}" for key, count in lost.items() if count]
        told += [f"{code}: {why}" for code, why in sorted(line.made.failed.items())[:3]] if told else []
        if told:
            words.append(f"{line.method.name}: {counts.get('photos_measured', 0)} photos ({', '.join(told)})")
    photos = lines[0].figures["counts"].get("photos") if words else 0
    return f"\n\nMeasured less than all {photos} photos: {'; '.join(words)}." if words else ""


def protection_table(lines: Sequence[Line], recognisers: Sequence[str], variants: Sequence[str]) -> str:
    """Markdown: Rank-1-U by recogniser before and after distortions, ISM, what it cost (JOD as saved alone), and of
    ours the share of faces that its own judge calls weak and how many faces the closed loop sent back."""
    head = ["method", "photos as", *(f"Rank-1-U {name}, %" for name in recognisers), "Rank-1-U average, % [95 %]"]
    head += ["ISM", "accepted as original, %", *JOD_HEAD, *PICTURES_HEAD]
    rows = [[*head, "weak, %", "went back", "s a face"]]
    for line in lines:
        made = line.made
        own = number(made.weak, 1, 100), number(made.strengthened, 0), number(made.seconds_per_face, 1)
        for variant in variants:
            cells, average = [line.cell(name, variant) for name in recognisers], line.cell(AVERAGE, variant) or {}
            pictures = (estimate(line.picture(m, variant), d, interval=False) for m, d in PICTURES)
            rows.append(
                [
                    line.method.name,
                    "saved" if variant == NONE else variant,
                    *("inside" if cell is None else estimate(cell["rank1_u"], 1, 100, False) for cell in cells),
                    estimate(average.get("rank1_u"), 1, 100),
                    estimate(average.get("ism")),
                    estimate(average.get("verified_own_1e-2"), 1, 100, False),
                    *line.jod(variant),
                    *pictures,
                    *(own if variant == NONE else ("-", "-", "-")),
                ]
            )
    return markdown(rows)


def record(lines: Sequence[Line], **about: Any) -> dict[str, Any]:
    """What goes to a JSON file."""
    return {**about, "machine": machine(), "lines": [line.to_dict() for line in lines]}
