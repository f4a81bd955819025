"""Benchmark of face detection against facenet-pytorch's one-image loop.

    python -m pipelines.bench.align [--photos DIR] [--limit N] [--threads 1 2] [--size SIDE ...]

Without ``--photos`` it makes its own: generated people on plain ground, 250 px with one and 1000 px with up to four.
Each contender is a process of its own, so that the allocator's setting (``scol_ops.runtime``) of one does not help the
other, and they take turns, so that a busy machine slows both.  Contenders:

- ``facenet``: ``MTCNN(keep_all=True).detect(photo, landmarks=True)``, one photo after the other, as its users run it;
- ``facenet+malloc``: the same with this project's allocator setting, to tell what that alone is worth;
- ``scol``: ``FaceDetector().detect(photos)``.

Reported: the median over the rounds of wall and of processor time, the ratios of the medians, and the recall of each
with respect to the other: the share of the faces of confidence >= 0.9 that one finds for which the other, at its
own confidence >= 0.9, has a box of IoU > 0.5.  Made photos have known faces, so there each one's recall against the
truth stands beside it.  Writes build/bench/align.json.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.bench.harness import draw_people, parse, record, resized, take_turns
from pipelines.run.environment import machine_line
from pipelines.run.text_tables import aligned, number
from scol_ops.detection import FaceDetector
from scol_ops.metrics import to_uint8
from scol_ops.models.embedded import load_mobilestylegan
from scol_ops.runtime import keep_freed_memory

CONTENDERS = ("facenet", "facenet+malloc", "scol")
CONFIDENCE = 0.9
SUFFIXES = {".jpg", ".jpeg", ".png"}


def facenet_mtcnn():
    """facenet-pytorch's MTCNN, without its package's ``__init__``, which imports packages that we do not install."""
    if "facenet_pytorch" not in sys.modules:
        spec = importlib.util.find_spec("facenet_pytorch")
        if spec is None:
            raise ModuleNotFoundError("facenet-pytorch is not installed (pip install --no-deps facenet-pytorch==2.6.0)")
        sys.modules["facenet_pytorch"] = importlib.util.module_from_spec(spec)
    from facenet_pytorch.models.mtcnn import MTCNN  # late: only now it can be found

    return MTCNN(keep_all=True)  # its torch.load unpickles nothing but tensors: weights_only since PyTorch 2.6


def made_photos(side: int, count: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Photos with generated people, and where their faces are: (K, 2) centres for each photo."""
    generator, rng = load_mobilestylegan(256), np.random.default_rng(seed)
    photos, truth = [], []
    for i in range(count):
        people = 1 if side < 600 else 1 + i % 4
        photo = np.full((side, side, 3), rng.integers(40, 215, 3), np.uint8)
        centres = []
        for k, pixels in enumerate(to_uint8(draw_people(people, seed * 1000 + i, generator)[1])):
            cell = side if people == 1 else side // 2
            face = int(rng.integers(int(0.45 * cell), int(0.98 * cell)))
            left = (k % 2) * cell + int(rng.integers(0, cell - face + 1))
            top = (k // 2) * cell + int(rng.integers(0, cell - face + 1))
            photo[top : top + face, left : left + face] = resized(pixels, face)
            centres.append((left + face / 2, top + 0.6 * face))  # the nose, where FFHQ's rule puts it
        photos.append(photo)
        truth.append(np.array(centres))
    return photos, truth


def load_photos(folder: Path, limit: int, side: int | None) -> list[np.ndarray]:
    """Every n-th photo of a folder, at all depths, ``limit`` in all; resized to a square side."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"no photos in {folder}")
    photos = []
    for path in paths[:: max(1, len(paths) // limit)][:limit]:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
        photos.append(resized(pixels, side) if side else pixels)
    return photos


def _worker(name: str, threads: int, photos: list[np.ndarray], pipe: Connection) -> None:
    torch.set_num_threads(threads)
    if name != "facenet":
        keep_freed_memory()
    if name == "scol":
        detector = FaceDetector()

        def run() -> list[list[tuple[list[float], float]]]:
            return [[(f.box.tolist(), f.score) for f in faces] for faces in detector.detect(photos)]
    else:
        mtcnn, pictures = facenet_mtcnn(), [Image.fromarray(p) for p in photos]

        def run() -> list[list[tuple[list[float], float]]]:
            answers = []
            for picture in pictures:
                boxes, scores, _ = mtcnn.detect(picture, landmarks=True)
                found = [] if boxes is None else zip(boxes, scores, strict=True)
                answers.append([(list(map(float, box)), float(score)) for box, score in found])
            return answers

    while pipe.recv():
        wall, processor = time.perf_counter(), time.process_time()
        answers = run()
        pipe.send((time.perf_counter() - wall, time.process_time() - processor, answers))


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    inter = np.prod(np.clip(high - low, 0, None))
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return float(inter / max(sum(areas) - inter, 1e-9))


def recall(reference: list, answers: list, shapes: list[tuple[int, int]]) -> tuple[int, int]:
    """(matched, all) faces of the reference at ``CONFIDENCE`` that the answers have at ``CONFIDENCE``."""
    matched = total = 0
    for wanted, got, (height, width) in zip(reference, answers, shapes, strict=True):
        # facenet-pytorch's boxes may reach over the edges, ours are clipped to them.
        clip = [np.clip(box, 0, [width, height] * 2) for box, score in got if score >= CONFIDENCE]
        for box, score in wanted:
            if score >= CONFIDENCE:
                total += 1
                matched += any(_iou(np.clip(box, 0, [width, height] * 2), other) > 0.5 for other in clip)
    return matched, total


def recall_of_truth(truth: list[np.ndarray], answers: list) -> tuple[int, int]:
    """(found, all) known faces whose centre lies in the middle half of a box of ``CONFIDENCE``."""
    found = 0
    for centres, got in zip(truth, answers, strict=True):
        boxes = np.array([box for box, score in got if score >= CONFIDENCE]).reshape(-1, 2, 2)
        middle, quarter = boxes.mean(1), (boxes[:, 1] - boxes[:, 0]) / 4
        found += sum(bool((abs(centre - middle) < quarter).all(1).any()) for centre in centres)
    return found, sum(map(len, truth))


def measure(photos: list[np.ndarray], truth: list[np.ndarray] | None, threads: int, rounds: int) -> dict[str, Any]:
    """One row of the table: all contenders in turns over the same photos."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in CONTENDERS:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=_worker, args=(name, threads, photos, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
    told: dict[str, list[tuple[float, float, list]]] = {name: [] for name in CONTENDERS}

    def turn(name: str) -> None:
        pipes[name].send(True)
        told[name].append(pipes[name].recv())

    take_turns({name: partial(turn, name) for name in CONTENDERS}, rounds)  # their own clocks count, not the pipe's
    for name, process in zip(CONTENDERS, processes, strict=True):
        pipes[name].send(False)
        process.join()
    row: dict[str, Any] = {"photos": len(photos), "threads": threads, "rounds": rounds}
    answers = {name: told[name][-1][2] for name in CONTENDERS}
    for name in CONTENDERS:
        wall, processor = (statistics.median(t[i] for t in told[name][1:]) / len(photos) for i in (0, 1))
        faces = sum(score >= CONFIDENCE for got in answers[name] for _, score in got)
        row[name] = {"wall_s": wall, "cpu_s": processor, "faces": faces}
        if truth is not None:
            row[name]["recall_of_truth"] = recall_of_truth(truth, answers[name])
    row["ratio_wall"] = row["facenet"]["wall_s"] / row["scol"]["wall_s"]
    row["ratio_cpu"] = row["facenet"]["cpu_s"] / row["scol"]["cpu_s"]
    row["ratio_wall_same_malloc"] = row["facenet+malloc"]["wall_s"] / row["scol"]["wall_s"]
    shapes = [p.shape[:2] for p in photos]
    row["scol_finds_of_facenet"] = recall(answers["facenet"], answers["scol"], shapes)
    row["facenet_finds_of_scol"] = recall(answers["scol"], answers["facenet"], shapes)
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """Of a row of the table."""
    parts = [row["scol_finds_of_facenet"], row["facenet_finds_of_scol"]]
    parts += [row[n]["recall_of_truth"] for n in ("scol", "facenet") if "recall_of_truth" in row[n]]
    walls = [f"{number(row[n]['wall_s'], 1, 1e3)}ms" for n in CONTENDERS]
    ratios = [number(row[name]) for name in ("ratio_wall", "ratio_cpu")]
    return [row["side"], row["threads"], *walls, *ratios, ", ".join(f"{a}/{b}" for a, b in parts)]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(
        "align", __doc__, arguments,
        photos={"type": Path, "help": "folder of photos (default: generated people)"},
        limit=(32, "photos of each size"), size=([250, 1000], "sides; 0: photos as they are"),
        threads=([1, 2], ""), rounds=(5, ""),
    )  # fmt: skip
    print(machine_line())
    rows = []
    for side in options.size:
        if options.photos:
            photos, truth = load_photos(options.photos, options.limit, side or None), None
        else:
            photos, truth = made_photos(side or 250, options.limit)
        rows += [measure(photos, truth, threads, options.rounds) | {"side": side} for threads in options.threads]
    head = ["side", "threads", "facenet", "+malloc", "scol", "ratio", "(cpu)"]
    head.append("recall of each other >= 0.9 (scol, facenet), of truth")
    print(aligned([head, *map(cells, rows)], *[">"] * 7))
    source = "folder" if options.photos else "generated"
    record(options.out, {"load": os.getloadavg(), "photos": source, "confidence": CONFIDENCE, "rows": rows})


if __name__ == "__main__":
    main()
