"""What the closed loop did to a run's faces, by what became of them: how much shows, how far they are recognised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from pipelines.run.folder import Run
from pipelines.run.schemas import WEAK
from pipelines.run.tables import as_run, read_stage
from pipelines.run.text_tables import markdown, number
from pipelines.stages.strengthen import PASSED, SIGHT

MEASURES = ("jod", "psnr", "face_ssim", "flip", "ism", "ism_worst")  # of `publish`; the first, and SSIM, may be null
OUTCOMES = (
    "hidden by a share",
    "hidden by the whole",
    "went back, hidden",
    "went back, still known",
    "known, not sent back",
    "seen too much: weak",
)


def outcome(row: Mapping[str, Any]) -> str:
    """Of a row of ``strengthen`` that was judged: one of ``OUTCOMES``.

    "Not sent back": there were no rounds.  "Seen too much": no picture hid it that may be seen.
    """
    share, whole, hidden, known, left, seen = OUTCOMES
    if row["ended"] == SIGHT:
        return seen
    if row["rounds"]:
        return hidden if row["ended"] == PASSED else known
    if row["ended"] != PASSED:
        return left
    return share if row["share"] is not None and row["share"] < 1 else whole


def by_outcome(rows: Iterable[Mapping[str, Any]], least_jod: float = 0.0) -> list[dict[str, Any]]:
    """Figures of all faces and of each outcome that occurs.

    Args:
        rows: one a face that was judged, columns of ``strengthen`` (`rounds`, `share`, `ended`) and of ``publish``
            (`status` and ``MEASURES``; parts of older versions lack some, and `share`).
        least_jod: the run's ``publish.min_jod``.

    Returns:
        `faces` (a name of ``OUTCOMES`` or "all"), `number`, means of the measures over the faces that have them (None
        where none has), `jod_p5`: the 5 % quantile, `share`: mean of the change that was kept, `weak`: 0..1, of faces
        whose verdict is weak, `least_jod`, and `below`: 0..1, of faces with a JOD below that; None where no bar is set.
    """
    rows = list(rows)
    groups = {name: [row for row in rows if outcome(row) == name] for name in OUTCOMES} | {"all": rows}
    return [
        {
            "faces": name,
            "number": len(found),
            **{measure: _of(found, measure, np.mean) for measure in MEASURES},
            "jod_p5": _of(found, "jod", lambda values: np.quantile(values, 0.05)),
            "share": _of(found, "share", np.mean),
            "weak": fmean(row["status"] == WEAK for row in found),
            "least_jod": least_jod,
            "below": _of(found, "jod", lambda values: np.mean(np.array(values) < least_jod)) if least_jod else None,
        }
        for name, found in groups.items()
        if found
    ]


def _of(rows: Sequence[Mapping[str, Any]], measure: str, what: Callable[[list[float]], Any]) -> float | None:
    """A statistic of a measure over the rows that have it."""
    values = [row[measure] for row in rows if row.get(measure) is not None]
    return float(what(values)) if values else None


def of_run(run: Run | str) -> list[dict[str, Any]]:
    """``by_outcome`` of a run's published faces; empty where the loop was off.

    Raises:
        RunError, StoreError: see ``read_stage``.
    """
    run = as_run(run)
    bar = run.read_json("run.json")["config"]["publish"].get("min_jod", 0.0)  # older versions have none
    judged = read_stage(run, "strengthen", ["face_id", "rounds", "share", "ended"]).to_pylist()
    published = read_stage(run, "publish", ["face_id", "status", *MEASURES]).to_pylist()
    by_face = {row["face_id"]: row for row in published if row["face_id"] and row["ism"] is not None}
    found = [row for row in judged if row["rounds"] is not None and row["face_id"] in by_face]
    return by_outcome(({**row, **by_face[row["face_id"]]} for row in found), bar)


def table(figures: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of ``by_outcome``."""
    head = ["faces", "number", "share of the change", "JOD", "JOD, 5 %", "PSNR of the crop, dB", "SSIM of the face"]
    bar = f"below {figures[0]['least_jod']:g} JOD, %" if figures else "below"
    rows = [[*head, "FLIP of the face", "cosine", "worst, as saved or after", "weak, %", bar]]
    for line in figures:
        names = ("jod", "jod_p5", *MEASURES[1:])
        measures = (number(line[name], 2 if name in ("jod", "jod_p5", "psnr") else 3) for name in names)
        shares = (number(line[name], 0, 100) for name in ("weak", "below"))
        rows.append([line["faces"], str(line["number"]), number(line["share"]), *measures, *shares])
    return markdown(rows)
