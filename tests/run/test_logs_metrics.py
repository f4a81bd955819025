"""Structured logs, metrics as Ray exports them, and the dashboard that asks for them."""

from __future__ import annotations

import json
import logging
import re
import time
import urllib.request
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cluster import Progress, ray_session
from cluster.worker import Failure, ShardResult
from pipelines.run.folder import Run
from pipelines.run.logs import JsonLog
from pipelines.run.metrics import METRICS, Metrics
from pipelines.run.observe import Observer
from pipelines.run.schemas import SOURCE
from pipelines.stages.rows import to_table

DASHBOARD = Path(__file__).parents[2] / "cluster" / "deploy" / "grafana.json"


def shard_of(run: Run, stage: str = "tune") -> ShardResult:
    def row(index: int, **more) -> dict:
        return {"key": "k", "photo_id": "p2", "face_id": f"p2-{index:02d}", "status": "ok"} | more

    rows = [
        row(0, status="error", reason="TIMEOUT: x", failed_stage="tune"),
        row(1, status="error", reason="GEOMETRY: x", failed_stage="align"),
        row(2),
    ]
    run.store.write_part(stage, None, to_table(stage, rows))
    (part,) = run.store.parts(stage)
    failures = [Failure("k", "WORKER_DIED: x")]
    return ShardResult(part, True, {"error": 2, "ok": 1}, 3.0, 4.0, 500, 600, failures)


def test_every_line_is_json_with_the_ids_that_are_known(tmp_path: Path) -> None:
    run, file = Run(str(tmp_path / "run")), tmp_path / "logs" / "scol.jsonl"
    observer = Observer(run)
    observer.photos = np.array([0xA0, 0xA1, 0xA2], np.uint64)
    quiet = logging.getLogger("cluster").level
    with JsonLog(str(file), "d1") as log:
        observer.log = log
        for stage in (SOURCE, "tune"):
            observer(Progress(stage, 1, 3, {}, 0.0))
        observer(Progress("tune", 1, 3, {}, 1.0, retried=2, restarts=1))
        observer(Progress("tune", 3, 3, {"error": 2, "ok": 1}, 1.0, restarts=1, items=(0, 2), shard=shard_of(run)))
        observer.work()
        logging.getLogger("cluster").info("a \"word\" of %s\nand more", "ü \ud800")
    logging.getLogger("cluster").warning("after the end")
    assert logging.getLogger("cluster").level == quiet
    with JsonLog(str(file), "d2") as log:  # another driver goes on in the same file
        log.event("start", run="r")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line["event"] for line in lines] == [
        *("stage", "stage", "worker_replaced", "shard", "row", "message", "start"),
    ]
    assert [line["driver"] for line in lines] == ["d1"] * 6 + ["d2"]
    shard = lines[3]
    assert (
        shard["photos"] == ["00000000000000a0", "00000000000000a2"]
        and shard["rows"] == {"error": 2, "ok": 1}
        and shard["bytes"] == 500
    )
    row = lines[4]
    assert (row["part"], row["photo_id"], row["face_id"], row["reason"]) == (shard["part"], "p2", "p2-00", "TIMEOUT: x")
    assert (lines[2]["restarts"], lines[2]["retried"], lines[1]["kept"]) == (1, 2, 1)
    assert lines[5]["message"].startswith('a "word" of ü ') and lines[5]["level"] == "INFO"
    assert file.stat().st_mode & 0o077 == 0, "ids are nobody else's business"


def exported(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Prometheus' text: name -> labels and value of each series."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)", text, re.M):
        found.setdefault(name, []).append((dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)))
    return found


def scraped() -> dict:
    """What Ray exports of one driver. Alone in a process: counters live as long as it, across sessions of Ray."""
    with TemporaryDirectory() as folder, ray_session(num_cpus=1):
        import ray

        node = ray.nodes()[0]
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        shard = shard_of(Run(str(Path(folder) / "run")))
        metrics = Metrics()
        workers = {"generator": (1, 2)}
        metrics(Progress("tune", 0, 9, {}, 0.0))
        for retried in (1, 3):
            told = {"retried": retried, "restarts": 2, "queued": 5, "workers": workers}
            metrics(Progress("tune", 4, 9, {}, 1.0, shard=shard, **told))
        deadline, wanted = time.monotonic() + 90, {f"ray_{name}" for name in METRICS}
        found: dict = {}
        while not wanted <= set(found) and time.monotonic() < deadline:
            time.sleep(1)
            with urllib.request.urlopen(url, timeout=30) as answer:
                found = exported(answer.read().decode())
        return found


def test_ray_exports_what_the_driver_counts(tmp_path: Path) -> None:
    Metrics()(Progress("tune", 1, 3, {}, 1.0, workers={"generator": (1, 2)}))  # no Ray: nothing happens
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        found = process.submit(scraped).result()
    wanted = {f"ray_{name}" for name in METRICS}
    assert wanted <= set(found), wanted - set(found)

    def value(name: str, **labels: str) -> float:
        (value,) = [v for have, v in found[f"ray_{name}"] if labels.items() <= have.items()]
        return value

    assert value("scol_rows_total", stage="tune", status="error") == 4
    assert value("scol_retried_photos_total", stage="tune") == 3 and value("scol_workers_replaced_total") == 2
    assert value("scol_failed_photos_total", stage="tune", reason="WORKER_DIED") == 2
    assert value("scol_photos_left", stage="tune") == value("scol_queued_photos", stage="tune") == 5
    assert value("scol_workers", pool="generator", state="ready") == 1
    assert value("scol_operator_seconds_total", stage="tune") == 6 and value("scol_bytes_total", stage="tune") == 1000
    for name, (_, tags, _) in METRICS.items():
        assert all(set(tags) <= set(labels) for labels, _ in found[f"ray_{name}"]), name


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    board = json.loads(DASHBOARD.read_text())
    asked: Counter[str] = Counter()
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        left, top, width, height = (panel["gridPos"][side] for side in "xywh")
        own = {(x, y) for x in range(left, left + width) for y in range(top, top + height)}
        assert not own & cells and max(x for x, _ in own) < 24, panel["title"]
        cells |= own
        for target in panel["targets"]:
            names = re.findall(r"\bray_(\w+)", target["expr"])
            assert names and set(names) <= set(METRICS), target["expr"]
            asked.update(names)
            tags = {tag for name in names for tag in METRICS[name][1]}
            used = re.findall(r"{{(\w+)}}", target["legendFormat"]) + re.findall(r"(\w+)=\"", target["expr"])
            used += [tag.strip() for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for tag in group.split(",")]
            assert set(used) <= tags, (target["expr"], used)
            for name in names:
                counts = METRICS[name][0] == "Counter"
                assert ("rate(ray_" + name not in target["expr"]) or counts, "a rate of a gauge means nothing"
    guide = (DASHBOARD.parents[2] / "docs" / "operate.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\bray_(scol_\w+)", guide)) <= set(METRICS)
    assert set(asked) == set(METRICS), "a metric that nobody looks at"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
