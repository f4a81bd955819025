"""Faces as `scol evaluate` measured them, for experiments that compare the same faces under several settings.

Only the face in the middle of a photo counts, as LFW has it, and each photo here is of another person.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.evaluate.measure import LOOK, PICTURE, column
from pipelines.evaluate.pairs import OK
from pipelines.evaluate.statistics import ClusterBootstrap
from pipelines.experiments.comparison import DISTORTION
from pipelines.run.text_tables import estimate, number
from scol_ops.distortions import NONE

SEEN = (NONE, DISTORTION)
MEASURES = ("rank1_u", "ism", *PICTURE)
COLUMNS = (*((measure, NONE) for measure in LOOK), *((measure, seen) for seen in SEEN for measure in MEASURES))
# Photo's path -> (len(COLUMNS),), NaN where the face lacks a measure.
Faces = Mapping[str, NDArray[np.float64]]


def read_faces(file: str | Path, judge: str, subject: str = "") -> dict[str, NDArray[np.float64]]:
    """Measures of `faces.parquet` of an evaluation, by path.

    Args:
        judge: recogniser of Rank-1-U and ISM.
        subject: see `pipelines.evaluate.measure.column`: empty, or `unprotected`.
    """
    table = pq.read_table(file)
    table = table.filter(pc.and_(pc.equal(table["status"], OK), pc.is_valid(table["person_id"])))

    def values(measure: str, seen: str) -> NDArray[np.float64]:
        if measure in (*LOOK, *PICTURE):
            name = column(measure, "", seen)
        else:
            name = column("rank" if measure == "rank1_u" else measure, judge, seen, subject)
        found = table[name].to_numpy().astype(np.float64)
        found = np.where(np.isfinite(found), found, np.nan)
        return np.where(np.isnan(found), np.nan, found > 1) if measure == "rank1_u" else found

    rows = np.stack([values(measure, seen) for measure, seen in COLUMNS], 1)
    return dict(zip(table["path"].to_pylist(), rows, strict=True))


def mean(found: Sequence[Faces]) -> dict[str, NDArray[np.float64]]:
    """Each face's means over judges; faces that all of them judged."""
    paths = sorted(set.intersection(*map(set, found)))
    return {path: np.mean([faces[path] for faces in found], 0) for path in paths}


def less(faces: Faces, base: Faces) -> dict[str, NDArray[np.float64]]:
    """Differences of the faces that both have."""
    return {path: faces[path] - base[path] for path in faces if path in base}


def estimates(faces: Faces) -> dict[str, dict[str, Any] | None]:
    """By column's name (`ism`, `ism@jpeg75+half`): the mean, with its interval over people; None without any."""
    names = [column(measure, "", seen) for measure, seen in COLUMNS]
    bootstrap = ClusterBootstrap(names, len(faces))
    if faces:
        bootstrap.add(list(faces), np.stack(list(faces.values())))
    return {name: None if found is None else found.to_dict() for name, found in bootstrap.estimates().items()}


def jod_cells(faces: Faces) -> tuple[str, str]:
    """Cells of `comparison.JOD_HEAD`: the mean of the files as saved with its interval, and the 5 % quantile."""
    values = np.array([row[COLUMNS.index(("jod", NONE))] for row in faces.values()], np.float64)
    known = values[np.isfinite(values)]
    lowest = float(np.quantile(known, 0.05)) if len(known) else None
    return estimate(estimates(faces)["jod"], 2), number(lowest)
