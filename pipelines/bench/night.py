"""An archive that was done last night: photos, their published tree and their run, made without any work on pictures.

All photos are links to a few small files (a file has at most 65,000 links), and so are their outputs. The run is one of
`scol protect` itself, whose stages give at once the rows that a photo without faces gets; all else, the listing, keys,
parts, plan and report, is real.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
from PIL import Image

from cluster import Operator, Stage
from cluster.worker import peak_memory
from pipelines.bench.harness import stages_changed
from pipelines.config.load import load_config
from pipelines.jobs.protect import protect
from pipelines.run.schemas import NO_FACE, SCHEMAS

_FOLDER = 1000  # photos in a folder
_LINKS = 60_000  # to one file


def make_tree(root: Path, photos: int) -> int:
    """Fill a folder with links to small JPEG files. Returns a file's size in bytes."""
    first = None
    for n in range(photos):
        path = root / f"{n // _FOLDER:04d}" / f"{n:08d}.jpg"
        if n % _FOLDER == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        if n % _LINKS == 0:
            first = path
            Image.new("RGB", (64, 64), "grey").save(first)
        else:
            os.link(first, path)
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


def _protect(folder: str, shard: int) -> dict[str, Any]:
    config = load_config("quick", sets=[f"engine.shard_photos={shard}"])
    return protect(f"{folder}/photos", f"{folder}/out", config)


def make_night(folder: str, photos: int, shard: int) -> None:
    """Make FOLDER/photos, FOLDER/out and FOLDER/out.run, with so many photos in a part."""
    size = make_tree(Path(folder) / "photos", photos)
    make_tree(Path(folder) / "out", photos)
    with stages_changed(partial(faceless, out=f"{folder}/out", size=size)):
        _protect(folder, shard)


def run_again(folder: str, shard: int) -> dict[str, Any]:
    """`scol protect` once more, in a process that does nothing else.

    Returns:
        photos; seconds since the process was started, imports included; peak resident size in bytes; items done by
        stage.
    """
    result = _protect(folder, shard)
    seconds = time.time() - psutil.Process().create_time()
    done = {name: stage["done"] for name, stage in result["engine"]["stages"].items()}
    return {"photos": result["photos"], "seconds": seconds, "process_bytes": peak_memory(), "done": done}
