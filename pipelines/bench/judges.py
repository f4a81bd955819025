"""Where a judge's bar lies: at which cosine to the very photo are a person's OTHER photos another's?

    python -m pipelines.bench.judges --folder FOLDER [FOLDER ...]

FOLDER: evaluations of protected development people, such as `OUT/evaluations` of `scol experiment run ablation` (people
who are in no other table).  Each recogniser counts where it was not inside.  A face's photo is compared with the
unprotected original (the cosine), and with another photo of the person among the gallery's strangers.  The bar is the
largest cosine at which, of all faces up to it, 95 % are rejected against the other photo at a false accept rate of
1e-3, and no other photo is ranked first; it goes into `Recogniser.hidden_below`.  Writes build/bench/judges.json.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq

from pipelines.bench.harness import parse, record
from pipelines.evaluate.measure import column
from pipelines.experiments.comparison import DISTORTION
from pipelines.run.text_tables import markdown, number
from scol_ops.distortions import NONE

STEP = 0.05  # of the curve, cosine
REJECTED = 0.95
FAR = "1e-3"
# A face: cosine to the very photo, whether the other photo is rejected, and whether it is ranked first.
Face = tuple[float, bool, bool]


def faces_of(folders: Iterable[str | Path]) -> dict[str, list[Face]]:
    """By recogniser, the faces of all evaluations in which it was not inside, as saved and after the distortion.

    Args:
        folders: each with NAME/evaluation.json and NAME/faces.parquet.
    """
    found: dict[str, list[Face]] = {}
    for folder in folders:
        for file in sorted(Path(folder).glob("*/evaluation.json")):
            if file.parent.name == "unprotected":
                continue
            about = json.loads(file.read_text(encoding="utf-8"))
            table = pq.read_table(file.with_name("faces.parquet"))
            for judge in about["recognisers"]:
                limit = judge["thresholds"][FAR]
                if not judge["inside"] and limit is not None:
                    found.setdefault(judge["name"], []).extend(_faces(table, judge["name"], limit))
    return found


def _faces(table: Any, name: str, limit: float) -> list[Face]:
    faces = []
    for seen in (NONE, DISTORTION):
        columns = (table[column(measure, name, seen)].to_pylist() for measure in ("ism", "mate", "rank"))
        faces += [
            (own, mate <= limit, rank == 1)
            for own, mate, rank in zip(*columns, strict=True)
            if None not in (own, mate, rank)
        ]
    return faces


def bar_of(faces: Sequence[Face]) -> float | None:
    """The largest cosine that fulfils the rule above; None where the lowest face does not."""
    bar, rejected = None, 0
    for count, (own, away, first) in enumerate(sorted(faces), 1):
        rejected += away
        if first:
            break
        if rejected >= REJECTED * count:
            bar = own
    return bar


def curve(faces: Sequence[Face]) -> list[dict[str, Any]]:
    """Shares, 0..1, by steps of the cosine: `rejected`, `first`, and `number` of faces."""
    by_step: dict[int, list[Face]] = {}
    for face in sorted(faces):
        by_step.setdefault(math.floor(face[0] / STEP), []).append(face)
    return [
        {
            "from": round(step * STEP, 2),
            "number": len(some),
            "rejected": fmean(away for _, away, _ in some),
            "first": fmean(first for _, _, first in some),
        }
        for step, some in by_step.items()
    ]


def main(argv: list[str] | None = None) -> int:
    """The command; exit status 0, or 2 where no face was found."""
    options = parse("judges", __doc__, argv, folder=(["build/experiments/ablation/evaluations"], "evaluations"))
    found = faces_of(options.folder)
    if not found:
        print(
            f"error: no evaluation of a recogniser that was not inside: {', '.join(map(str, options.folder))}",
            file=sys.stderr,
        )
        return 2
    result = {name: {"bar": bar_of(faces), "curve": curve(faces)} for name, faces in found.items()}
    for name, about in result.items():
        rows = [["cosine to the very photo, from", "faces", f"other photo rejected at FAR {FAR}, %", "ranked first, %"]]
        rows += [
            [
                number(line["from"], 2),
                str(line["number"]),
                number(line["rejected"], 0, 100),
                number(line["first"], 0, 100),
            ]
            for line in about["curve"]
        ]
        print(f"{name}: bar {number(about['bar'], 3)}\n\n{markdown(rows)}\n")
    record(options.out, {"folders": [str(folder) for folder in options.folder], "judges": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
