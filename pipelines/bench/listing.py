"""What listing and planning take before any photo is opened: seconds, memory, and the local disk.

    python -m pipelines.bench.listing [--photos 1000000] [--nights 2]

A synthetic listing (no file is made) goes the way of `scol protect`: into a listing's file, compared with the last
run's plan, keyed for all stages, written as the plan, and planned by the engine against a store without parts of
stages. The second night finds the same photos. Writes build/bench/listing.json.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator

from cluster import Engine
from cluster.worker import forget_peak_memory, peak_memory
from pipelines.archive.entry import SourceRow
from pipelines.archive.listing import spooled
from pipelines.bench.harness import apart, parse, record
from pipelines.config.load import load_config
from pipelines.config.names import STAGES
from pipelines.jobs import changes as night_changes
from pipelines.jobs.chain import planned
from pipelines.jobs.renewal import renewal
from pipelines.run.folder import Run
from pipelines.run.keys import chain, stage_rules
from pipelines.stages.chain import make_stages
from pipelines.stages.declaration import Setting


def entries(photos: int, first: int = 0) -> Iterator[SourceRow]:
    """As from a folder of so many photos, a thousand in each of its folders; from the photo `first` on."""
    for n in range(first, photos):
        path = f"{n // 1000:06d}/{n:09d}.jpg"
        yield SourceRow(path, "/archive/" + path, 100_000 + n % 1_000_000, str(1_700_000_000_000_000_000 + n))


def night(folder: str, photos: int) -> dict[str, float]:
    """One night in this process: seconds of each step, and by how much the resident size grew at most, bytes."""
    config, weights = load_config(), {stage: "0" * 16 for stage in STAGES}
    out = f"{folder}/out"
    run = Run(f"{folder}/out.run")
    stages = make_stages(Setting(config, weights, gallery="", out=out, photos=photos))
    forget_peak_memory()
    before, begin = peak_memory(), time.perf_counter()
    found: dict[str, float] = {}

    def step(name: str) -> None:
        nonlocal begin
        found[name], begin = round(time.perf_counter() - begin, 2), time.perf_counter()

    listing = spooled(entries(photos), "/archive")
    step("listing")
    changes = night_changes.compare(run, "/archive", listing, listing.all_ids, listing.failed, "stat")
    if changes.unchanged not in (0, photos):
        raise RuntimeError(f"the comparison is wrong: {changes}")
    step("comparing")
    rules = stage_rules(config, weights, out)
    rules["publish"] = chain(rules["publish"], renewal(run, out))
    run.write_plan((planned(table, rules) for table in listing), {"source": "/archive", "evidence": "stat"})
    step("plan_file")
    if len(Engine(run.store, stages).plan(listing, rules)) != photos:
        raise RuntimeError("the plan is wrong")
    step("planning")
    sizes = {"grown_bytes": peak_memory() - before, "plan_file_bytes": os.path.getsize(run.path("plan.parquet"))}
    return {**found, "seconds": round(sum(found.values()), 2), "unchanged": changes.unchanged, **sizes}


def main() -> None:
    options = parse("listing", __doc__, photos=(1_000_000, ""), nights=(2, ""))
    nights = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.nights):
            nights.append(apart(night, folder, options.photos))
            print(f"night {number + 1}: " + ", ".join(f"{name} {value:,}" for name, value in nights[-1].items()))
    record(options.out, {"photos": options.photos, "nights": nights})


if __name__ == "__main__":
    main()
