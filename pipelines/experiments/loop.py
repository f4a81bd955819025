"""What the closed loop did to a run's faces, by what became of them: how much shows, how far they are recognised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from pipelines.config.sections import StrengthenConfig
from pipelines.run.folder import Run
from pipelines.run.schemas import WEAK
from pipelines.run.tables import read_stage
from pipelines.run.text_tables import markdown, number
from pipelines.stages.strengthen import PASSED

MEASURES = ("jod", "psnr", "face_ssim", "flip", "ism", "ism_worst")  # of `publish`; the first, and SSIM, may be null
OUTCOMES = ("passed at once", "went back, stronger", "went back, as before", "known, but too much changed to go back")
LEAST_PSNR = StrengthenConfig().min_psnr  # dB over the crop: the stated quality, a face below it is counted


def outcome(row: Mapping[str, Any]) -> str:
    """Of a row of ``strengthen`` that was judged: one of ``OUTCOMES``. "As before": no round was better."""
    if not row["rounds"]:
        return OUTCOMES[0] if row["ended"] == PASSED else OUTCOMES[3]
    return OUTCOMES[1] if row["kept"] else OUTCOMES[2]


def by_outcome(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Figures of all faces and of each outcome that occurs.

    Args:
        rows: one a face that was judged, columns of ``strengthen`` (`rounds`, `kept`, `ended`) and of ``publish``
            (`status` and ``MEASURES``; parts of older versions lack some).

    Returns:
        `faces` (a name of ``OUTCOMES`` or "all"), `number`, means of the measures over the faces that have them (None
        where none has), `jod_p5`: the 5 % quantile, and `weak`, `below`: shares, 0..1, of faces whose verdict is weak,
        and whose PSNR is below ``LEAST_PSNR``.
    """
    rows = list(rows)
    groups = {name: [row for row in rows if outcome(row) == name] for name in OUTCOMES} | {"all": rows}
    return [
        {
            "faces": name,
            "number": len(found),
            **{measure: _of(found, measure, np.mean) for measure in MEASURES},
            "jod_p5": _of(found, "jod", lambda values: np.quantile(values, 0.05)),
            "weak": fmean(row["status"] == WEAK for row in found),
            "below": fmean(row["psnr"] < LEAST_PSNR for row in found),
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
    judged = read_stage(run, "strengthen", ["face_id", "rounds", "kept", "ended"]).to_pylist()
    published = read_stage(run, "publish", ["face_id", "status", *MEASURES]).to_pylist()
    by_face = {row["face_id"]: row for row in published if row["face_id"] and row["ism"] is not None}
    found = [row for row in judged if row["rounds"] is not None and row["face_id"] in by_face]
    return by_outcome({**row, **by_face[row["face_id"]]} for row in found)


def table(figures: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of ``by_outcome``."""
    head = ["faces that", "number", "JOD", "JOD, 5 %", "PSNR of the crop, dB", "SSIM of the face", "FLIP of the face"]
    rows = [[*head, "cosine", "worst, as saved or after", "weak, %", f"below {LEAST_PSNR:g} dB, %"]]
    for line in figures:
        names = ("jod", "jod_p5", *MEASURES[1:])
        measures = (number(line[name], 2 if name in ("jod", "jod_p5", "psnr") else 3) for name in names)
        shares = (number(line[name], 0, 100) for name in ("weak", "below"))
        rows.append([line["faces"], str(line["number"]), *measures, *shares])
    return markdown(rows)
