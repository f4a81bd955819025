"""Benchmark of the engine: rows a second beside others, planning, efficiency, overhead.

    python -m pipelines.bench.engine [--only rows,planning,efficiency,overhead,night] [--rows 1000000] ...

- rows: the same Parquet files (--rows rows in --shards files) through a stage that does nothing, by this engine (with
  its manifest: the source's rows are stored as well), by datatrove's local executor, and by plain Ray Data with
  `write_parquet`, one after the other, each with --workers processes. Seconds are of the job: the start of Ray is left
  out, that of workers is not. Memory is the largest sum of the resident sizes of all processes of the job, sampled five
  times a second; shared pages count in each. Files are those left in the output's folder.
- planning: a synthetic listing of --photos-planned photos, made and keyed as `scol protect` does, compared with a store
  that has --photos-done of them at every stage.
- efficiency: --actors workers with items of --item-seconds that only sleep. While every worker has work (from the
  moment that the last one began to that at which the first one ran out): their time in the operator by the time passed.
  The workers reserve no cores.
- overhead: --photos photos of generated people through all stages with the quick profile. Of each generator worker
  (they have nearly all the work) from its first call of an operator to the end of its last: what is not inside
  operators, by what is. So reading and writing parts, waiting for the driver and for other stages' faces count, the
  start does not.
- night: `scol protect` over --photos-night unchanged photos (`pipelines.bench.night` makes the archive and the night
  before, with 256 photos in a part), from the start of the process to the end of the run. Making them takes longer.

datatrove and Ray Data run in an environment of their own (requirements-bench.txt, `make bench-engine` makes it). Writes
build/bench/engine.json; parts that were not measured keep what an earlier call wrote there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import Engine, PartStore, Pool, Resources, Stage, hash_key, hash_keys, ray_session
from cluster.worker import peak_memory
from pipelines.archive.listing import source_key
from pipelines.bench import chaos_work
from pipelines.bench.harness import (
    ROOT,
    apart,
    command_apart,
    make_photos,
    parse,
    record,
    recorded,
    stages_changed,
    watched,
)
from pipelines.bench.listing import entries
from pipelines.bench.night import make_night, run_again
from pipelines.config.load import load_config
from pipelines.config.names import STAGES, VERSIONS
from pipelines.jobs.protect import protect
from pipelines.run.environment import machine, machine_line
from pipelines.run.text_tables import aligned, number

BENCH_PYTHON = ROOT / "build" / "bench-venv" / "bin" / "python"
PARTS = ("rows", "planning", "efficiency", "overhead", "night")

COMMON = [("key", pa.string()), ("status", pa.string()), ("reason", pa.string())]
ROW = pa.schema([*COMMON, ("id", pa.string()), ("text", pa.string())])
TIMES = pa.schema(COMMON)

# datatrove names the columns that it writes, so this reads and writes what it would in a pipeline of its own.
DATATROVE = """
import sys, time
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter

def noop(data, rank=0, world_size=1):
    yield from data

if __name__ == "__main__":
    source, out, logs, tasks, workers = sys.argv[1:]
    begin = time.perf_counter()
    LocalPipelineExecutor(
        [ParquetReader(source, glob_pattern="*.parquet"), noop, ParquetWriter(out, compression="zstd")],
        tasks=int(tasks), workers=int(workers), logging_dir=logs,
    ).run()
    print(time.perf_counter() - begin)
"""

RAY_DATA = """
import glob, sys, time
import ray

if __name__ == "__main__":
    source, out, logs, tasks, workers = sys.argv[1:]
    ray.init(address="local", num_cpus=int(workers), include_dashboard=False, object_store_memory=2**30,
             log_to_driver=False, logging_level="error")
    import ray.data
    ray.data.DataContext.get_current().enable_progress_bars = False
    begin = time.perf_counter()
    files = sorted(glob.glob(source + "/*.parquet"))
    table = ray.data.read_parquet(files, override_num_blocks=int(tasks))
    table = table.map_batches(lambda rows: rows, batch_format="pyarrow", batch_size=None)
    table.write_parquet(out, compression="zstd")
    print(time.perf_counter() - begin)
"""


# ---- rows a second ---------------------------------------------------------------------------------------------------


def make_rows(folder: Path, rows: int, shards: int) -> None:
    """Parquet files with `id` and `text`, rows shared equally."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        numbers = range(rows * shard // shards, rows * (shard + 1) // shards)
        ids = [f"{n:08d}" for n in numbers]
        table = pa.table({"id": ids, "text": [f"row number {n}, and a few more words" for n in numbers]})
        pq.write_table(table, folder / f"{shard:06d}.parquet", compression="zstd")


def make_noop():
    return lambda rows: rows


def failed_row(rows: pa.Table, reason: str, schema: pa.Schema = TIMES) -> pa.Table:
    """Of an item that failed."""
    return pa.Table.from_pylist([{"key": rows["key"][0].as_py(), "status": "error", "reason": reason}], schema)


def listing(folder: Path) -> Iterator[pa.Table]:
    """The files' rows as a source, some files at a time."""
    paths = sorted(folder.glob("*.parquet"))
    for first in range(0, len(paths), 16):
        tables = [pq.ParquetFile(path).read(use_threads=False) for path in paths[first : first + 16]]
        table = pa.concat_tables(tables)
        key = pa.array(hash_keys(["source"], table["id"].to_pylist()), pa.string())
        status = pa.array(["ok"] * len(table), pa.string())
        columns = [key, status, pa.nulls(len(table), pa.string()), table["id"], table["text"]]
        yield pa.Table.from_arrays(columns, schema=ROW)


def run_scol(source: str, out: str, shards: int, rows: int, workers: int) -> float:
    """Seconds of this engine."""
    size = -(-rows // shards)
    failed = partial(failed_row, schema=ROW)
    stage = Stage("noop", "1", ROW, make_noop, failed, batch_items=size, resources=Resources(threads=1))
    with ray_session(num_cpus=workers):
        begin = time.perf_counter()
        engine = Engine(PartStore(out), [stage], pools={"default": Pool(actors=workers)}, shard_items=size)
        engine.run(listing(Path(source)), {"noop": partial(hash_keys, ["noop", "1"])})
        return time.perf_counter() - begin


def measure_rows(rows: int, shards: int, workers: int) -> dict[str, Any]:
    """Each system in a process of its own."""
    if not BENCH_PYTHON.exists():
        raise FileNotFoundError(f"{BENCH_PYTHON}: `make bench-engine` makes it from requirements-bench.txt")
    systems: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="scol-bench-") as name:
        folder = Path(name)
        make_rows(folder / "in", rows, shards)
        for system, code in {"scol": None, "datatrove": DATATROVE, "ray_data": RAY_DATA}.items():
            out, script = folder / system, folder / f"job_{system}.py"
            if code is None:
                command = command_apart(run_scol, folder / "in", out, shards, rows, workers)
            else:
                script.write_text(code)
                command = [BENCH_PYTHON, script, folder / "in", out, folder / "logs", shards, workers]
            seconds, peak = watched(command)
            parts = (out / "noop" if code is None else out).rglob("*.parquet")
            if (written := sum(pq.read_metadata(path).num_rows for path in parts)) != rows:
                raise RuntimeError(f"{system} wrote {written} rows of {rows}")
            files = sum(path.is_file() for path in out.rglob("*"))
            numbers = {"rows_per_second": rows / seconds, "seconds": seconds, "peak_bytes": peak, "files_left": files}
            systems[system] = numbers
            shutil.rmtree(out)
    return {"rows": rows, "shards": shards, "workers": workers, "systems": systems}


# ---- planning --------------------------------------------------------------------------------------------------------


def source_keys(photos: int, window: int = 1 << 16) -> Iterator[pa.Table]:
    """Source keys of a synthetic listing, made from `SourceRow`s as `scol protect` does."""
    for first in range(0, photos, window):
        keys = [source_key(row) for row in entries(min(photos, first + window), first)]
        yield pa.table({"key": pa.array(keys, pa.string())})


def plan(folder: str, photos: int, done: int) -> dict[str, float]:
    """Seconds, and the process's peak resident size in bytes."""
    rules = {stage: partial(hash_keys, [hash_key(stage, VERSIONS[stage], "configuration")]) for stage in STAGES}
    store = PartStore(folder)
    for table in source_keys(done, 1024):
        keys = table["key"].to_pylist()
        store.write_part("source", None, table)
        for stage in STAGES:
            keys = rules[stage](keys)
            store.write_part(stage, None, pa.table({"key": keys}))
    stages = [Stage(name, "1", TIMES, make_noop, failed_row) for name in STAGES]
    begin = time.perf_counter()
    plan = Engine(store, stages).plan(source_keys(photos), rules)
    seconds = time.perf_counter() - begin
    missing = plan.missing()
    if len(plan) != photos or set(missing.values()) != {photos - done}:
        raise RuntimeError(f"the plan is wrong: {len(plan)} photos, missing {missing}")
    # not ru_maxrss, which a process has from the one that started it
    return {"seconds": seconds, "process_bytes": peak_memory()}


def measure_planning(photos: int, done: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="scol-bench-") as folder:
        return {"photos": photos, "done": min(done, photos), **apart(plan, folder, photos, min(done, photos))}


# ---- efficiency ------------------------------------------------------------------------------------------------------


def make_sleep(log: str, seconds: float, actors: int):
    """An operator that sleeps for each item and notes when; monotonic clock, one for all processes of a machine.

    The workers wait for each other, because they start one after the other, which is not what is measured.
    """
    file = open(Path(log) / str(os.getpid()), "a", buffering=1)  # for the life of the process
    end = time.monotonic() + 900
    while len(os.listdir(log)) < actors:
        if time.monotonic() > end:
            raise TimeoutError("the other workers have not started")
        time.sleep(0.5)

    def sleep(rows: pa.Table) -> pa.Table:
        begin = time.monotonic()
        time.sleep(seconds * rows.num_rows)
        file.write(f"{begin} {time.monotonic()}\n")
        return rows

    return sleep


def measure_efficiency(actors: int, item_seconds: float, items: int, shard_items: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="scol-bench-") as name, ray_session():
        log = Path(name) / "log"
        log.mkdir()
        keys = [hash_key("item", n) for n in range(items)]
        source = pa.table({"key": keys, "status": ["ok"] * items, "reason": pa.nulls(items, pa.string())}, schema=TIMES)
        stage = Stage("sleep", "1", TIMES, partial(make_sleep, str(log), item_seconds, actors), failed_row)
        pools = {"default": Pool(actors=actors, resources=Resources(num_cpus=0, threads=1))}
        engine = Engine(PartStore(f"{name}/store"), [stage], pools=pools, shard_items=shard_items)
        begin = time.perf_counter()
        engine.run(source, {"sleep": partial(hash_keys, ["sleep"])})
        wall = time.perf_counter() - begin
        times = [np.loadtxt(path, ndmin=2) for path in log.iterdir() if path.stat().st_size]
    if len(times) != actors:
        raise RuntimeError(f"{len(times)} workers of {actors} had work: more items are needed, or workers died")
    first, last = max(t[0, 0] for t in times), min(t[-1, 1] for t in times)
    if last <= first:
        raise RuntimeError("there was no time at which all workers had work: more items are needed")
    busy = sum(np.clip(np.minimum(t[:, 1], last) - np.maximum(t[:, 0], first), 0, None).sum() for t in times)
    return {
        "actors": actors, "item_seconds": item_seconds, "items": items, "shard_items": shard_items,
        "efficiency": busy / (actors * (last - first)), "window_seconds": last - first, "wall_seconds": wall,
    }  # fmt: skip


# ---- overhead --------------------------------------------------------------------------------------------------------


def measure_overhead(photos: int, workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="scol-bench-") as name:
        folder = Path(name)
        make_photos(folder / "photos", photos)
        (folder / "calls").mkdir()
        os.environ[chaos_work.LOG] = str(folder / "calls")
        config = load_config("quick", sets=[f"engine.workers={workers}", "engine.threads=1", "gallery.synthetic=5000"])
        begin = time.perf_counter()
        with stages_changed(chaos_work.watched):
            summary = protect(str(folder / "photos"), str(folder / "out"), config)
        wall = time.perf_counter() - begin
        busy, passed, seen = _generator_time(folder / "calls")
    if seen != workers:
        raise RuntimeError(f"{seen} generator workers had work, not {workers}")
    return {
        "photos": photos, "faces": summary["faces"], "workers": workers, "overhead": (passed - busy) / busy,
        "operator_seconds": busy, "wall_seconds": wall,
    }  # fmt: skip


def _generator_time(calls: Path) -> tuple[float, float, int]:
    """Seconds that the generator's workers spent inside operators, and from the first call's begin to the last's end,
    both summed over the workers; and how many of them there were."""
    busy, passed, seen = 0.0, 0.0, 0
    for path in calls.glob("*.jsonl"):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        if not events or events[0]["stage"] not in ("invert", "tune", "attack"):
            continue
        begins, ends = ([e["time"] for e in events if mark in e] for mark in ("begin", "end"))
        busy += sum(ends) - sum(begins)
        passed += ends[-1] - begins[0]
        seen += 1
    return busy, passed, seen


# ---- night -----------------------------------------------------------------------------------------------------------


def measure_night(photos: int, shard: int = 256) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="scol-bench-") as folder:
        apart(make_night, folder, photos, shard)
        found = apart(run_again, folder, shard)
    if found["photos"] != photos or any(found.pop("done").values()):
        raise RuntimeError(f"the night was not unchanged: {found}")
    return {**found, "shard": shard}


# ---- the command -----------------------------------------------------------------------------------------------------


def measure(part: str, options: argparse.Namespace, workers: int, result: dict[str, Any]) -> str:
    """Measure a part and put it into `result`. Returns what was found, in words."""
    if part == "rows":
        found = result["rows"] = measure_rows(options.rows, options.shards, workers)
        result["rows_per_second"] = {name: one["rows_per_second"] for name, one in found["systems"].items()}
        head = f"{options.rows} rows in {options.shards} shards, {workers} processes"
        lines = [(head, "rows/s", "GiB", "files left")]
        lines += [
            (name, number(one["rows_per_second"], 0), number(one["peak_bytes"], scale=2**-30), one["files_left"])
            for name, one in found["systems"].items()
        ]
        return aligned(lines, "<", ">", ">", ">")
    if part == "planning":
        found = result["planning"] = measure_planning(options.photos_planned, options.photos_done)
        words, of = f"planning {found['photos']} photos", " (peak of the whole process)"
    elif part == "night":
        found = result["night"] = measure_night(options.photos_night)
        words, of = f"an unchanged night over {found['photos']} photos", ""
    elif part == "efficiency":
        found = measure_efficiency(options.actors, options.item_seconds, options.items, options.shard_items)
        result["efficiency"], result["efficiency_details"] = found.pop("efficiency"), found
        return f"efficiency of {found['actors']} actors: {result['efficiency']:.3f}"
    else:
        found = measure_overhead(options.photos, workers)
        result["overhead"], result["overhead_details"] = found.pop("overhead"), found
        return f"overhead on {found['photos']} photos: {100 * result['overhead']:.1f} %"
    return f"{words}: {found['seconds']:.1f} s, {found['process_bytes'] / 2**30:.2f} GiB{of}"


def main() -> int:
    options = parse(
        "engine", __doc__,
        only=(",".join(PARTS), "some parts"), rows=(1_000_000, ""), shards=(2000, ""),
        workers={"type": int, "help": "processes of each system [default: the cores]"},
        photos_planned=(10_000_000, ""), photos_done=(100_000, ""), actors=(64, ""), item_seconds=(0.05, ""),
        items=(40_960, "of the efficiency"), shard_items=(64, "of the efficiency"), photos=(256, "of the overhead"),
        photos_night=(1_000_000, ""),
    )  # fmt: skip
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        print(f"error: no part {', '.join(unknown)}", file=sys.stderr)
        return 2
    result = recorded(options.out)
    print(machine_line())
    for part in wanted:
        print(measure(part, options, options.workers or machine()["cores"], result))
        record(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
