"""Benchmark of the stages: faces a second, memory, tuning steps a second, and the engine's overhead.

    python -m pipelines.bench.stages [--faces 4] [--profile quick] [--workers 1]

Protects photos of generated people (one face each) in a fresh folder through the whole engine, as ``scol
protect`` does, and reads the seconds that each operator measured from the manifests.  Memory by stage is the
largest resident size of a worker while it worked at it, with all networks of its pool; memory of all workers
together is sampled five times a second.  With one worker,
overhead = time in which photos were under way minus the sum of the operators' seconds; the start of Ray and
the loading of networks are told apart.  Prints a table and writes build/bench/stages.json.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from pipelines.bench.harness import make_photos, parse, record
from pipelines.bench.memory import MemoryWatch, is_ray_worker
from pipelines.config.load import PROFILES, load_config
from pipelines.config.names import STAGES
from pipelines.jobs.protect import protect
from pipelines.run.environment import machine_line
from pipelines.run.folder import Run
from pipelines.run.tables import read_stage
from pipelines.run.text_tables import aligned, number


def measure(faces: int, profile: str, workers: int) -> dict[str, object]:
    """Protect so many photos; seconds and bytes by stage and of the whole run."""
    config = load_config(profile, sets=[f"engine.workers={workers}", "gallery.synthetic=5000"])
    with tempfile.TemporaryDirectory(prefix="scol-bench-") as folder:
        make_photos(Path(folder) / "photos", faces)
        begin = time.monotonic()
        with MemoryWatch(counts=is_ray_worker) as watch:
            summary = protect(f"{folder}/photos", f"{folder}/out", config, say=lambda text: None)
        wall = time.monotonic() - begin
        stages = {}
        for stage in (s for s in STAGES if s in summary["engine"]["stages"]):
            seconds = [s for s in read_stage(Run(f"{folder}/out.run"), stage)["seconds"].to_pylist() if s is not None]
            stages[stage] = {
                "faces": len(seconds), "seconds": sum(seconds),
                "faces_per_second": len(seconds) / max(sum(seconds), 1e-9),
                "peak_bytes": summary["engine"]["stages"][stage]["peak_bytes"],
            }  # fmt: skip
    return {
        "faces": faces, "profile": profile, "workers": workers, "wall_seconds": wall, "stages": stages,
        "operator_seconds": sum(s["seconds"] for s in stages.values()),
        "tuning_steps_per_second": config.tune.steps * stages["tune"]["faces"] / max(stages["tune"]["seconds"], 1e-9),
        "all_workers_bytes": watch.peak,
        "summary": {k: summary[k] for k in ("photos", "faces", "ok", "weak", "error")},
    }  # fmt: skip


def overhead_share(small: dict, large: dict) -> float | None:
    """The engine's time by the operators', from two runs of different size: what does not grow with the photos is
    start-up, what does is operators and engine. None where the larger run has no more work."""
    grown = large["wall_seconds"] - small["wall_seconds"]
    operators = (large["operator_seconds"] - small["operator_seconds"]) / large["workers"]
    return (grown - operators) / operators if operators > 0 else None


def main() -> None:
    options = parse(
        "stages", __doc__, faces=(4, "photos of the larger run"), workers=(1, ""),
        profile={"choices": sorted(PROFILES), "default": "quick"},
    )  # fmt: skip
    print(f"{machine_line()}; profile {options.profile}, {options.faces} faces, {options.workers} worker(s)")
    small, large = (measure(faces, options.profile, options.workers) for faces in (1, options.faces))
    start, share = small["wall_seconds"] - small["operator_seconds"], overhead_share(small, large)
    rows = [("stage", "seconds a face", "faces a second", "peak memory, GiB")]
    for stage, row in large["stages"].items():
        a_face = number(row["seconds"] / max(row["faces"], 1))
        rows.append((stage, a_face, number(row["faces_per_second"]), number(row["peak_bytes"], scale=2**-30)))
    print(aligned(rows, "<10", ">", ">", ">"))
    print(f"tuning (with refinement): {large['tuning_steps_per_second']:.2f} steps/s")
    print(f"all workers together {large['all_workers_bytes'] / 2**30:.2f} GiB")
    print(f"start (Ray, networks, gallery) {start:.1f} s")
    if share is not None:
        print(f"engine overhead over the operators' own time: {100 * share:.1f} %")
    record(options.out, {**large, "start_seconds": start, "overhead_share": share})


if __name__ == "__main__":
    main()
