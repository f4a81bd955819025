"""The totals of a run, from its tables."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.run.folder import Run, stages_of
from pipelines.run.schemas import ERROR, OK, STATUSES, WEAK
from pipelines.run.tables import as_run, read_photos, read_stage

# Columns of `publish`: their means and distributions are told.
MEASURES = ("psnr", "ssim", "flip", "face_psnr", "face_ssim", "jod", "jod_4k", "ism", "ism_jpeg", "ism_worst")


def _statistics(column: pa.ChunkedArray) -> dict[str, float] | None:
    values = [v for v in column.to_pylist() if v is not None and math.isfinite(v)]
    if not values:
        return None
    return {
        "n": len(values),
        "mean": round(statistics.fmean(values), 4),
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "p5": round(float(np.quantile(values, 0.05)), 4),
        "p95": round(float(np.quantile(values, 0.95)), 4),
    }


def _strengthened(run: Run) -> dict[str, Any]:
    """What the closed loop did."""
    rows = read_stage(run, "strengthen", ["rounds", "share", "ended"]).to_pylist()
    judged = [row for row in rows if row["rounds"] is not None]
    shares = [row["share"] for row in judged if row["share"] is not None]
    return {
        "judged": len(judged),
        "less": sum(share < 1 for share in shares),
        "share": round(statistics.fmean(shares), 4) if shares else None,
        "faces": sum(row["rounds"] > 0 for row in judged),
        "rounds": sum(row["rounds"] for row in judged),
        "ended": dict(sorted(Counter(row["ended"] for row in judged).items())),
    }


def summary(run: Run | str) -> dict[str, Any]:
    """Totals of a run as they stand, from the manifests; see docs/manifests.md (`summary.json`).

    `faces` counts faces; `ok`, `weak`, `no_face`, `error`, `pending` count photos by their worst face.  `psnr`, `ssim`,
    `flip`, `face_psnr`, `face_ssim`, `jod`, `jod_4k`, `ism`, `ism_jpeg`, `ism_worst` are means over the faces that were
    published protected, `spread` has their distribution; null where no row has the measure.
    """
    run = as_run(run)
    photos = read_photos(run)
    counts = Counter(photos["status"].to_pylist())
    actions = Counter(photos["action"].to_pylist())
    faces = read_stage(run, "publish", ["face_id", "status", "reason", "judge", "max_ism", *MEASURES])
    face_counts = Counter(
        s for s, f in zip(faces["status"].to_pylist(), faces["face_id"].to_pylist(), strict=True) if f
    )
    reasons = Counter((r or "").split(":")[0] for r in faces["reason"].to_pylist() if r)
    seconds: dict[str, float] = {}
    stages = stages_of(run.plan())
    for stage in stages:
        column = read_stage(run, stage, ["seconds"])["seconds"]
        seconds[stage] = round(float(pc.sum(column).as_py() or 0.0), 3)
    judged = face_counts[OK] + face_counts[WEAK]
    spreads = {name: _statistics(faces[name]) for name in MEASURES}
    judges = {j for j in faces["judge"].to_pylist() if j}
    limits = {round(m, 4) for m in faces["max_ism"].to_pylist() if m is not None}
    return {
        "photos": photos.num_rows,
        "faces": sum(face_counts.values()),
        **{status: counts.get(status, 0) for status in (*STATUSES, "pending")},
        "face_status": {status: face_counts.get(status, 0) for status in (OK, WEAK, ERROR)},
        "weak_share": round(face_counts[WEAK] / judged, 4) if judged else None,
        "strengthened": _strengthened(run) if "strengthen" in stages else None,
        "published": actions.get("protected", 0),
        "copied": actions.get("copied", 0),
        "reasons": dict(sorted(reasons.items())),
        **{name: spread["mean"] if spread else None for name, spread in spreads.items()},
        "spread": spreads,
        "judge": judges.pop() if len(judges) == 1 else None,
        "max_ism": limits.pop() if len(limits) == 1 else None,
        "stage_seconds": seconds,
        "seconds": None,
    }
