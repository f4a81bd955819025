"""Benchmark of the stages: faces a second, memory, tuning steps a second, and the engine's overhead.

    python -m pipelines.bench.bench_stages [--faces 4] [--profile quick] [--workers 1]

Protects photos of generated people (one face each) in a fresh folder through the whole engine, as ``scol
protect`` does, and reads the seconds that each operator measured from the manifests.  Memory by stage is the
largest resident size of a worker while it worked at it, with all networks of its pool; memory of all workers
together is sampled five times a second.  With one worker,
overhead = time in which photos were under way minus the sum of the operators' seconds; the start of Ray and
the loading of networks are told apart.  Prints a table and writes build/bench/stages.json.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from pipelines.bench.memory import MemoryWatch, is_ray_worker
from pipelines.config.load import PROFILES, load_config
from pipelines.config.names import STAGES
from pipelines.jobs.protect import protect
from pipelines.run.environment import machine
from pipelines.run.folder import Run
from pipelines.run.tables import read_stage
from scol_ops.metrics import to_uint8
from scol_ops.models.embedded import load_mobilestylegan


def make_photos(folder: Path, count: int) -> None:
    """Photos of 512 px with one generated face each."""
    generator = load_mobilestylegan(256)
    z = torch.randn(count, 512, generator=torch.Generator().manual_seed(21))
    folder.mkdir(parents=True)
    with torch.no_grad():
        w = generator.mean_code + 0.7 * (generator.mapping(z) - generator.mean_code)
        for i, code in enumerate(w):
            picture = generator(code.expand(1, 16, -1)).clamp(-1, 1)
            stream = io.BytesIO()
            Image.fromarray(to_uint8(picture[0])).resize((512, 512), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=92)
            (folder / f"{i:03d}.jpg").write_bytes(stream.getvalue())


def measure(faces: int, profile: str, workers: int) -> dict[str, object]:
    config = load_config(profile, sets=[f"engine.workers={workers}", "gallery.synthetic=5000"])
    with tempfile.TemporaryDirectory(prefix="scol-bench-") as folder:
        make_photos(Path(folder) / "photos", faces)
        watch = MemoryWatch(counts=is_ray_worker)
        watch.start()
        begin = time.monotonic()
        summary = protect(f"{folder}/photos", f"{folder}/out", config, say=lambda text: None)
        wall = time.monotonic() - begin
        watch.stopped.set()
        run = Run(f"{folder}/out.run")
        stages = {}
        for stage in (s for s in STAGES if s in summary["engine"]["stages"]):
            rows = read_stage(run, stage)
            seconds = [s for s in rows["seconds"].to_pylist() if s is not None]
            stages[stage] = {"faces": len(seconds), "seconds": sum(seconds), "faces_per_second": len(seconds) / max(sum(seconds), 1e-9),
                             "peak_bytes": summary["engine"]["stages"][stage]["peak_bytes"]}
    return {
        "faces": faces, "profile": profile, "workers": workers, "wall_seconds": wall, "stages": stages,
        "operator_seconds": sum(s["seconds"] for s in stages.values()),
        "tuning_steps_per_second": config.tune.steps * stages["tune"]["faces"] / max(stages["tune"]["seconds"], 1e-9),
        "all_workers_bytes": watch.peak,
        "summary": {k: summary[k] for k in ("photos", "faces", "ok", "weak", "error")},
    }


def overhead_share(small: dict, large: dict) -> float | None:
    """The engine's time by the operators', from two runs of different size: what does not grow with the photos is
    start-up, what does is operators and engine. None where the larger run has no more work."""
    grown = large["wall_seconds"] - small["wall_seconds"]
    operators = (large["operator_seconds"] - small["operator_seconds"]) / large["workers"]
    return (grown - operators) / operators if operators > 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=int, default=4, help="photos of the larger run (default 4)")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="quick")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/bench/stages.json"))
    arguments = parser.parse_args()
    small, large = measure(1, arguments.profile, arguments.workers), measure(arguments.faces, arguments.profile, arguments.workers)
    result = {
        "machine": machine(), **large, "start_seconds": small["wall_seconds"] - small["operator_seconds"],
        "overhead_share": overhead_share(small, large),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1))
    print(f"{result['machine']['cpu']}, {result['machine']['cores']} cores; profile {arguments.profile}, "
          f"{arguments.faces} faces, {arguments.workers} worker(s)")
    print(f"{'stage':10} {'seconds a face':>15} {'faces a second':>15} {'peak memory, GiB':>17}")
    for stage, row in large["stages"].items():
        print(f"{stage:10} {row['seconds'] / max(row['faces'], 1):15.2f} {row['faces_per_second']:15.2f} {row['peak_bytes'] / 2**30:17.2f}")
    print(f"tuning (with refinement): {large['tuning_steps_per_second']:.2f} steps/s")
    print(f"all workers together {large['all_workers_bytes'] / 2**30:.2f} GiB")
    print(f"start (Ray, networks, gallery) {result['start_seconds']:.1f} s")
    if result["overhead_share"] is not None:
        print(f"engine overhead over the operators' own time: {100 * result['overhead_share']:.1f} %")


if __name__ == "__main__":
    main()
