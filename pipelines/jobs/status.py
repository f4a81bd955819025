"""``scol status``: how far a run is, and how it came out so far."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow.compute as pc

from pipelines.run import presence
from pipelines.run.folder import Run, stages_of
from pipelines.run.schemas import SOURCE
from pipelines.run.summary import summary
from pipelines.run.tables import read_stage
from pipelines.run.text import duration
from pipelines.run.text_tables import number

_MEASURES = ("jod", "face_psnr", "face_ssim", "flip", "psnr", "ssim")  # of `summary`


def status(url: str) -> dict[str, Any]:
    """Photos done at each stage, rows there by status, the photos' states, and who is at work; see docs/operate.md.

    Raises:
        RunError: not a run's folder.
    """
    run = Run(url)
    drivers = presence.drivers(run)
    words = ("ok", "weak", "no_face", "error", "pending", "published", "copied")
    if any(driver["alive"] for driver in drivers) and not run.has("plan.parquet"):  # it lists SRC
        nothing = {word: 0 for word in words}
        return {"run": url, "photos": 0, "faces": 0, "stages": {}, "drivers": drivers, **nothing}
    plan = run.plan()
    stages = {}
    for stage in (SOURCE, *stages_of(plan)):
        rows = read_stage(run, stage, ["key", "status"])
        done = pc.count_distinct(rows["key"]).as_py() if rows.num_rows else 0
        stages[stage] = {"done": done, "rows": dict(Counter(rows["status"].to_pylist()))}
    totals = summary(run)
    faces = read_stage(run, "align", ["face_id"])["face_id"]
    return {
        "run": url,
        "photos": plan.num_rows,
        "faces": len(faces) - faces.null_count,
        "stages": stages,
        "drivers": drivers,
        **{word: totals[word] for word in (*words, *_MEASURES, "ism", "judge")},
        "jod_p5": (totals["spread"]["jod"] or {}).get("p5"),
    }


def status_lines(found: dict[str, Any]) -> list[str]:
    """``status`` for people."""
    living = [driver for driver in found["drivers"] if driver["alive"]]
    lines = [presence.words(driver) for driver in living or found["drivers"][-1:]]
    lines.append(f"{found['photos']} photos, {found['faces']} faces found")
    now: dict[str, Any] = {}
    for driver in living:
        now |= driver.get("stages", {})
    for stage, entry in found["stages"].items():
        line = f"  {stage:10} {entry['done']:>7}/{found['photos']} photos"
        live = now.get(stage)
        if live is not None and stage != SOURCE:
            line += f"  {live['total'] - live['done']:>7} left"
            if live["rate"]:
                line += f"  {60 * live['rate']:>8.1f}/min  {duration(live['seconds_left'])} left"
        counts = ", ".join(f"{n} {word}" for word, n in entry["rows"].items() if n)
        lines.append(f"{line}  {counts}".rstrip())
    for driver in living:
        pools = (f"{pool} {ready}/{wanted}" for pool, (ready, wanted) in driver.get("workers", {}).items())
        text = ", ".join(pools) or "none yet"
        lines.append(f"workers  {text}" + (f"; {driver['restarts']} replaced" if driver.get("restarts") else ""))
    lines += [f"{word:8} {found[word]:>7}" for word in ("ok", "weak", "no_face", "error", "pending")]
    if found.get("jod") is not None:
        lines.append(
            f"faces so far  JOD {found['jod']:.2f}, 5 % below {found['jod_p5']:.2f}; over the face PSNR "
            f"{number(found['face_psnr'])} dB, SSIM {number(found['face_ssim'], 3)}, FLIP {number(found['flip'], 3)}"
        )
    for driver in living:
        for row in driver.get("last_errors", [])[-5:]:
            lines.append(f"last error  {row['failed_stage']}  {row['face_id'] or row['photo_id']}: {row['reason']}")
    return lines
