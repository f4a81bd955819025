"""Benchmark of the gallery: exact search of both ends against two FAISS searches and a bare matrix product.

    python -m pipelines.bench.bench_gallery

Codes come from the embedded mapping network: one W an id for the ``broadcast`` gallery, and for the
other one W a layer and id, as a gallery of mixed styles or of inverted photos has.  Queries are codes of
other people with noise at every layer, as an encoder's are.  The contenders take turns in one process, and
the median of each is printed.  Writes build/bench/gallery.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np
import torch

from gallery_index import CodeBatch, Gallery, SearchResult, build, synthetic_codes
from gallery_index.reference import faiss_search
from pipelines.machine import machine, machine_line
from scol_ops.models.weights import load_mobilestylegan
from scol_ops.runtime import set_up

LAYERS = 16
K = 10


def take_turns(
    contenders: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of each; one unmeasured round first."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats + 1):
        for name, run in contenders.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def mixed(batches: list[CodeBatch], seed: int) -> CodeBatch:
    """All codes of the batches, with every layer's rows in another order: (n, L, 512)."""
    codes = np.concatenate([b.codes[:, 0] for b in batches])
    rng = np.random.default_rng(seed)
    ids = [id_ for b in batches for id_ in b.photo_ids]
    return CodeBatch(np.stack([codes[rng.permutation(len(codes))] for _ in range(LAYERS)], axis=1), ids, ids)


def bench(gallery: Gallery, queries: np.ndarray, repeats: int, clock: Callable[[], float]) -> list[dict[str, float]]:
    """One row a batch size: seconds of ours, of FAISS and of the products alone, and how they compare."""
    indexes = [gallery.faiss_index(layer) for layer in range(gallery.info.stored_layers)]
    # FAISS's own memory, not a copy of it.
    stored = [
        torch.from_numpy(faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(-1, index.d))
        for index in indexes
    ]
    rows = []
    for batch in (1, 64):
        codes = queries[:batch]
        unit = torch.from_numpy(gallery.unit_queries(codes))
        products = [unit.flatten(0, 1)] if gallery.info.broadcast else list(unit.transpose(0, 1).contiguous())

        def gemm(products: list[torch.Tensor] = products) -> None:
            for product, vectors in zip(products, stored, strict=True):
                if len(product) > 8:
                    torch.mm(product, vectors.T)
                else:  # the faster form for a few queries, and faster for two than for one
                    torch.mm(vectors, product.repeat(2 if len(product) == 1 else 1, 1).T)

        seconds = take_turns(
            {
                "ours": lambda codes=codes: gallery.search(codes, K),
                "faiss": lambda codes=codes: faiss_search(gallery, codes, K, indexes=indexes),
                "gemm": gemm,
            },
            repeats,
            clock,
        )
        ours = gallery.search(codes, K)
        most, _, least, _ = faiss_search(gallery, codes, K, indexes=indexes)
        rows.append(
            {
                "batch": batch,
                "broadcast": gallery.info.broadcast,
                **seconds,
                "vs_faiss": seconds["faiss"] / seconds["ours"],
                "vs_gemm": seconds["gemm"] / seconds["ours"],
                "same_ids_as_faiss": float(np.mean(ours.most_ids == most)),
                "same_least_as_faiss": float(np.mean(ours.least_ids == least)),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="codes in the gallery")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor seconds of this process, for a machine that others use too (with --threads 1)",
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/gallery.json"))
    options = parser.parse_args(arguments)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    set_up(options.threads)
    faiss.omp_set_num_threads(options.threads)

    mapping = load_mobilestylegan(256, head=None).mapping
    rng = np.random.default_rng(0)
    others = np.concatenate([b.codes for b in synthetic_codes(64, 1, mapping)])
    queries = (others + rng.normal(scale=0.1, size=(64, LAYERS, 512))).astype(np.float32)
    weights = {"generator": "benchmark", "encoder": None}
    result: dict[str, object] = {"machine": machine(), "k": K} | {
        name: getattr(options, name) for name in ("threads", "clock", "count", "repeats")
    }
    rows, galleries = [], []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as folder:
        people = list(synthetic_codes(options.count, 0, mapping))
        for name, change, layers in (
            ("broadcast", lambda: people, LAYERS),
            ("float16", lambda: _halved(people), LAYERS),
            ("per layer", lambda: [mixed(people, 0)], None),
        ):
            batches = list(change())
            start = clock()
            info = build(f"{folder}/{name}", batches, weights=weights, broadcast_layers=layers)
            built = clock() - start
            del batches
            start = clock()
            gallery = Gallery.load(f"{folder}/{name}")
            loaded = clock() - start
            size = sum(entry.size for entry in info.files.values())
            galleries.append({"gallery": name, "build": built, "load": loaded, "megabytes": size / 1e6})
            if name == "float16":
                result["float16"] = _compare(reference, gallery.search(queries, K))
                continue
            rows += bench(gallery, queries, options.repeats, clock)
            if name == "broadcast":
                reference = gallery.search(queries, K)
            del gallery
    result |= {"search": rows, "galleries": galleries}
    result["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    print(f"{machine_line()}; {options.threads} threads, {options.clock} time")
    print(f"{options.count} codes, {LAYERS} layers, k = {K}, both ends")
    heads = ("ours", "FAISS x 2", "product", "vs FAISS", "of product", "same ids")
    print(f"{'gallery':<10} {'B':>3} " + " ".join(f"{head:>10}" for head in heads))
    for row in rows:
        name = "broadcast" if row["broadcast"] else "per layer"
        times = " ".join(f"{row[column] * 1e3:>7.1f} ms" for column in ("ours", "faiss", "gemm"))
        shares = f"{row['vs_faiss']:>9.1f}x {row['vs_gemm']:>10.2f} {row['same_ids_as_faiss']:>10.3%}"
        print(f"{name:<10} {row['batch']:>3} {times} {shares}")
    for row in galleries:
        times = f"built in {row['build']:.1f} s, loaded in {row['load']:.2f} s"
        print(f"{row['gallery']}: {times}, {row['megabytes']:.0f} MB")
    print("codes rounded to float16: " + ", ".join(f"{k} {v:.5g}" for k, v in result["float16"].items()))
    print(f"peak memory of the process {result['peak_megabytes']:.0f} MiB (with FAISS's indexes)")
    options.out.write_text(json.dumps(result, indent=1))
    print(f"written to {options.out}")
    return 0


def _halved(batches: list[CodeBatch]) -> Iterator[CodeBatch]:
    for batch in batches:
        yield batch._replace(codes=batch.codes.astype(np.float16).astype(np.float32))


def _compare(full: SearchResult, half: SearchResult) -> dict[str, float]:
    """How much the answers change where the gallery's codes were rounded to float16."""
    return {
        "same_most": float(np.mean(full.most_ids == half.most_ids)),
        "same_most_as_sets": float(np.mean([len(set(a) & set(b)) / K for a, b in zip(
            full.most_ids.reshape(-1, K), half.most_ids.reshape(-1, K), strict=True)])),
        "same_least": float(np.mean(full.least_ids == half.least_ids)),
        "largest_change_of_mean": float(np.abs(full.most_vectors.mean(2) - half.most_vectors.mean(2)).max()),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
