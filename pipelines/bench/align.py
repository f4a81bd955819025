"""Benchmark of face detection against facenet-pytorch's one-image loop.

    python -m pipelines.bench.bench_align [--photos DIR] [--limit N] [--threads 1 2] [--size SIDE ...]

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

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.run.environment import machine, machine_line
from scol_ops.detection import FaceDetector
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
    from facenet_pytorch.models.mtcnn import MTCNN

    return MTCNN(keep_all=True)  # its torch.load unpickles nothing but tensors: weights_only since PyTorch 2.6


def make_photos(side: int, count: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Photos with generated people, and where their faces are: (K, 2) centres for each photo."""
    from scol_ops.models.embedded import load_mobilestylegan

    generator, rng = load_mobilestylegan(256), np.random.default_rng(seed)
    photos, truth = [], []
    with torch.no_grad():
        for i in range(count):
            people = 1 if side < 600 else 1 + i % 4
            z = torch.randn(people, 512, generator=torch.Generator().manual_seed(seed * 1000 + i))
            w = generator.mapping(z)
            w = generator.mean_code + 0.7 * (w - generator.mean_code)
            pictures = generator(w[:, None].expand(-1, 16, -1)).clamp(-1, 1)
            photo = np.full((side, side, 3), rng.integers(40, 215, 3), np.uint8)
            centres = []
            for k, picture in enumerate(pictures):
                pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
                cell = side if people == 1 else side // 2
                face = int(rng.integers(int(0.45 * cell), int(0.98 * cell)))
                left = (k % 2) * cell + int(rng.integers(0, cell - face + 1))
                top = (k // 2) * cell + int(rng.integers(0, cell - face + 1))
                photo[top : top + face, left : left + face] = np.array(
                    Image.fromarray(pixels).resize((face, face), Image.Resampling.BICUBIC)
                )
                centres.append((left + face / 2, top + 0.6 * face))  # the nose, where FFHQ's rule puts it
            photos.append(photo)
            truth.append(np.array(centres))
    return photos, truth


def load_photos(folder: Path, limit: int, side: int | None) -> list[np.ndarray]:
    """Every n-th photo of a folder, at all depths, ``limit`` in all; resized to a square side."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"no photos in {folder}")
    paths = paths[:: max(1, len(paths) // limit)][:limit]
    photos = []
    for path in paths:
        with Image.open(path) as image:
            image = image.convert("RGB")
        photos.append(np.array(image.resize((side, side), Image.Resampling.BICUBIC) if side else image))
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
                some = boxes is not None
                answers.append([(list(map(float, b)), float(s)) for b, s in zip(boxes, scores)] if some else [])
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
    found = total = 0
    for centres, got in zip(truth, answers, strict=True):
        for centre in centres:
            total += 1
            found += any(
                score >= CONFIDENCE
                and abs(centre[0] - (box[0] + box[2]) / 2) < (box[2] - box[0]) / 4
                and abs(centre[1] - (box[1] + box[3]) / 2) < (box[3] - box[1]) / 4
                for box, score in got
            )
    return found, total


def measure(photos: list[np.ndarray], truth: list[np.ndarray] | None, threads: int, rounds: int) -> dict[str, Any]:
    """One row of the table: all contenders in turns over the same photos."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in CONTENDERS:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=_worker, args=(name, threads, photos, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    answers: dict[str, list] = {}
    for _ in range(rounds + 1):
        for name in CONTENDERS:
            pipes[name].send(True)
            wall, processor, answers[name] = pipes[name].recv()
            times[name].append((wall, processor))
    for name, process in zip(CONTENDERS, processes, strict=True):
        pipes[name].send(False)
        process.join()
    shapes = [p.shape[:2] for p in photos]
    row: dict[str, Any] = {"photos": len(photos), "threads": threads, "rounds": rounds}
    for name in CONTENDERS:  # the first round warms up
        row[name] = {
            "wall_s": statistics.median(t[0] for t in times[name][1:]) / len(photos),
            "cpu_s": statistics.median(t[1] for t in times[name][1:]) / len(photos),
            "faces": sum(score >= CONFIDENCE for got in answers[name] for _, score in got),
        }
        if truth is not None:
            row[name]["recall_of_truth"] = recall_of_truth(truth, answers[name])
    row["ratio_wall"] = row["facenet"]["wall_s"] / row["scol"]["wall_s"]
    row["ratio_cpu"] = row["facenet"]["cpu_s"] / row["scol"]["cpu_s"]
    row["ratio_wall_same_malloc"] = row["facenet+malloc"]["wall_s"] / row["scol"]["wall_s"]
    row["scol_finds_of_facenet"] = recall(answers["facenet"], answers["scol"], shapes)
    row["facenet_finds_of_scol"] = recall(answers["scol"], answers["facenet"], shapes)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--photos", type=Path, help="folder of photos (default: generated people)")
    parser.add_argument("--limit", type=int, default=32, help="photos of each size")
    parser.add_argument("--size", type=int, nargs="+", default=[250, 1000], help="sides; 0: photos as they are")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/bench/align.json"))
    options = parser.parse_args(arguments)

    print(machine_line())
    print(f"{'side':>5} {'threads':>7} {'facenet':>9} {'+malloc':>9} {'scol':>9}  {'ratio':>5} {'(cpu)':>6}   "
          "recall of each other >= 0.9 (scol, facenet), of truth")
    rows = []
    for side in options.size:
        if options.photos:
            photos, truth = load_photos(options.photos, options.limit, side or None), None
        else:
            photos, truth = make_photos(side or 250, options.limit)
        for threads in options.threads:
            row = measure(photos, truth, threads, options.rounds) | {"side": side}
            rows.append(row)
            parts = [row["scol_finds_of_facenet"], row["facenet_finds_of_scol"]]
            parts += [row[n]["recall_of_truth"] for n in ("scol", "facenet")] if truth else []
            shares = ", ".join(f"{a}/{b}" for a, b in parts)
            walls = " ".join(f"{row[n]['wall_s'] * 1e3:7.1f}ms" for n in CONTENDERS)
            ratios = f"{row['ratio_wall']:5.2f} {row['ratio_cpu']:6.2f}"
            print(f"{side:5} {threads:7} {walls}  {ratios}   {shares}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    source = "folder" if options.photos else "generated"
    found = {"machine": machine(), "load": os.getloadavg(), "photos": source, "confidence": CONFIDENCE, "rows": rows}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
