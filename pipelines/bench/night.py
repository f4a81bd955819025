"""An archive that was done last night: a tree of photos, its published tree and its run, made without any work on pictures.

All photos are links to a few small files (a file has at most 65,000 links), and so are their outputs. The run is one of
`scol protect` itself, whose stages give at once the rows that a photo without faces gets; all else, the listing, keys,
parts, plan and report, is real.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa

from cluster import Operator, Stage
from cluster.worker import peak_memory
from pipelines.run.schemas import NO_FACE, SCHEMAS

_FOLDER = 1000  # photos in a folder
_LINKS = 60_000  # to one file


def make_tree(root: Path, photos: int) -> int:
    """Fill a folder with links to small JPEG files. Returns a file's size in bytes."""
    from PIL import Image

    first = None
    for n in range(photos):
        if n % _LINKS == 0:
            first = root / f"{n // _FOLDER:04d}" / f"{n:08d}.jpg"
            first.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), "grey").save(first)
        else:
            if n % _FOLDER == 0:
                os.makedirs(root / f"{n // _FOLDER:04d}", exist_ok=True)
            os.link(first, f"{root}/{n // _FOLDER:04d}/{n:08d}.jpg")
    return first.stat().st_size


def faceless(stages: Sequence[Stage], out: str, size: int) -> list[Stage]:
    """The same stages with operators that say of each photo that it has no face and has been copied."""
    return [
        replace(stage, factory=partial(_operator, stage.name, out, size), item_seconds=None, batch_items=1024)
        for stage in stages
    ]


def _operator(stage: str, out: str, size: int) -> Operator:
    schema = SCHEMAS[stage]

    def operator(rows: pa.Table) -> pa.Table:
        count = rows.num_rows
        given = {
            "key": rows["key"],
            "photo_id": rows["photo_id"],
            "status": pa.array([NO_FACE] * count),
            "reason": pa.array(["NO_FACE: none found"] * count),
            "seconds": pa.array([0.001] * count, pa.float32()),
        }
        if stage == "publish":
            given["path"] = rows["source.path"]
            given["action"] = pa.array(["copied"] * count)
            given["out_path"] = pa.array([f"{out}/{path}" for path in rows["source.path"].to_pylist()])
            given["out_bytes"] = pa.array([size] * count, pa.int64())
            given["sha256"] = pa.array(["0" * 64] * count)
        return pa.table([given.get(f.name, pa.nulls(count, f.type)) for f in schema], schema=schema)

    return operator


def make_run(src: Path, out: Path, size: int, shard: int, say: Callable[[str], None] = lambda text: None) -> None:
    """Run `scol protect` with such stages. `shard`: photos in a part."""
    from pipelines.config.load import load_config
    from pipelines.jobs import chain
    from pipelines.jobs import protect as protect_job

    make_stages = chain.make_stages
    chain.make_stages = lambda *args, **settings: faceless(make_stages(*args, **settings), str(out), size)
    try:
        protect_job.protect(str(src), str(out), load_config("quick", sets=[f"engine.shard_photos={shard}"]), say=say)
    finally:
        chain.make_stages = make_stages


def run_again(folder: str, shard: str) -> None:
    """`scol protect` once more. Prints a JSON object: seconds, peak resident size in bytes, items done by stage."""
    import json

    begin = time.perf_counter()
    from pipelines.config.load import load_config
    from pipelines.jobs import protect as protect_job

    config = load_config("quick", sets=[f"engine.shard_photos={shard}"])
    result = protect_job.protect(f"{folder}/photos", f"{folder}/out", config)
    seconds = time.perf_counter() - begin
    done = {name: stage["done"] for name, stage in result["engine"]["stages"].items()}
    words = {"photos": result["photos"], "seconds": seconds, "process_bytes": peak_memory(), "done": done}
    print(json.dumps(words))


def main() -> None:
    """`python -m pipelines.bench.night FOLDER PHOTOS SHARD`: makes FOLDER/photos, FOLDER/out and FOLDER/out.run."""
    folder, photos, shard = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    begin = time.perf_counter()
    size = make_tree(folder / "photos", photos)
    make_tree(folder / "out", photos)
    print(f"{photos} photos and outputs: {time.perf_counter() - begin:.0f} s", flush=True)
    make_run(folder / "photos", folder / "out", size, shard, say=lambda text: print(text, flush=True))
    print(f"with their run: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    from pipelines.bench.night import main  # not of __main__, whose functions workers could not import

    main()
