"""Benchmark of the gallery: exact search, compressed search, nightly rebuild.

    python -m pipelines.bench.gallery [--only exact] [--only compressed] [--only rebuild]

Codes come from the embedded mapping network; each layer holds them in an order of its own, as mixed styles or inverted
photos do.  Queries are codes of other people with noise at every layer, as an encoder's are, or codes of real photos
(``--real GALLERY``, built by ``scol gallery build PHOTOS``).  Contenders take turns in one process; a ratio is the
median over the turns of the ratio within the turn.

- ``exact``: both ends, k = 10, against two searches of FAISS's IndexFlatIP (q and -q), against the bare product
  (batches), and against reading the codes once from memory (one query).  16 layers of 200,000 are
  timed as four times four layers, and the times added, so that FAISS's copy fits beside ours.
- ``compressed``: one layer of a million codes: build time, recall of the ten most and the ten least similar, speed and
  memory beside the exact search for some numbers of probed lists.
- ``rebuild``: a version of 200,000 people, then one with 1 % of them changed, against building that from nothing.

Writes build/bench/gallery.json; a part or size that is not run keeps its last result there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from cluster.worker import peak_memory
from gallery_index import CodeBatch, Gallery, Plan, Store, build, check, synthetic_codes
from gallery_index.builder import GalleryBuilder
from gallery_index.info import GalleryInfo
from gallery_index.reference import faiss_search
from gallery_index.scoring import norms
from gallery_index.storage import Folder
from gallery_index.tuning import choose
from pipelines.bench.harness import parse, record, recorded, take_turns
from pipelines.run.environment import machine, machine_line
from pipelines.run.text_tables import aligned, number
from scol_ops.models.embedded import load_mobilestylegan
from scol_ops.runtime import set_up

K = 10
DIM = 512
WEIGHTS = {"generator": "benchmark", "encoder": None}
PARTS = ("exact", "compressed", "rebuild")
PROBES = (8, 16, 32, 64, 128, 256, 512)


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """Median of the ratios of pairs."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def people(count: int, seed: int) -> np.ndarray:
    """W codes of synthetic people: (count, 512) float32."""
    mapping = load_mobilestylegan(256, head=None).mapping
    return np.concatenate([batch.codes[:, 0] for batch in synthetic_codes(count, seed, mapping)])


def in_memory(codes: torch.Tensor) -> Gallery:
    """A gallery that was never written: codes (L, N, D)."""
    layers, count, dim = codes.shape
    mean = torch.stack([sum(part.double().sum(0) for part in layer.split(4096)) / count for layer in codes])
    parts = ([norms(part, m, "centred") for part in layer.split(4096)] for layer, m in zip(codes, mean, strict=True))
    lengths = torch.stack([torch.cat(layer) for layer in parts]).numpy()
    ids = [f"synthetic-{i:07d}" for i in range(count)]
    info = GalleryInfo(
        mode="centred", count=count, layers=layers, dim=dim, broadcast=False, photos=count, people=count,
        embedding_dim=None, weights=WEIGHTS, source="benchmark", codes=(), indexes=(), mean="", norms="", files={},
    )  # fmt: skip
    return Gallery(Folder("."), info, ids, ids, list(ids), codes, lengths, mean.numpy(), None)


def noisy(codes: np.ndarray, layers: int) -> np.ndarray:
    """Queries (B, layers, 512): codes of other people with noise at every layer."""
    rng = np.random.default_rng(0)
    return (codes[:, None] + rng.normal(scale=0.1, size=(len(codes), layers, DIM))).astype(np.float32)


# ---- exact -----------------------------------------------------------------------------------------------------------


def source_codes(options: argparse.Namespace, count: int) -> np.ndarray:
    """(count, 512): the file's, or drawn."""
    return np.load(options.codes, mmap_mode="r")[:count] if options.codes else people(count, 0)


def exact(options: argparse.Namespace, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """A row a size: seconds of each contender, and the ratios."""
    rows = []
    for count in options.counts:
        source = source_codes(options, count)
        for layers in options.layers:
            at_once = layers if count * layers <= 400_000 else 4
            sums: dict[int, dict[str, np.ndarray]] = {batch: {} for batch in options.batches}
            same: dict[int, list[float]] = {batch: [] for batch in options.batches}
            for first in range(0, layers, at_once):
                codes = torch.empty(at_once, count, DIM)
                for layer in range(at_once):
                    order = np.random.default_rng(first + layer).permutation(count)
                    np.take(source, order, axis=0, out=codes[layer].numpy())
                gallery = in_memory(codes)
                indexes = [gallery.faiss_index(layer) for layer in range(at_once)]
                queries = real_queries(options, at_once)
                for batch in options.batches:
                    times, equal = _exact_turns(gallery, codes, indexes, queries[:batch], options.repeats, clock)
                    same[batch].append(equal)
                    for name, seconds in times.items():
                        sums[batch][name] = sums[batch].get(name, 0) + np.array(seconds)
                del gallery, indexes, codes
            for batch, times in sums.items():
                rows.append(
                    {"count": count, "layers": layers, "batch": batch}
                    | {"threads": options.threads, "clock": options.clock}
                    | {name: float(np.median(seconds)) for name, seconds in times.items()}
                    | {f"vs_{name}": ratio(times, name, "ours") for name in times if name != "ours"}
                    | {"same_ids_as_faiss": float(np.mean(same[batch]))}
                )
    return rows


def _size(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["clock"], row["threads"], row["count"], row["layers"], row["batch"]


def real_queries(options: argparse.Namespace, layers: int) -> np.ndarray:
    """As many queries as the largest batch needs, of real photos first where there are some."""
    queries = noisy(people(max(options.batches), 1), layers)
    codes = real_codes(options, len(queries))
    queries[: len(codes)] = codes[:, :layers]
    return queries


def real_codes(options: argparse.Namespace, most: int) -> np.ndarray:
    """(N, L, 512) of `--real`, N <= most."""
    if not options.real:
        return np.empty((0, 1, DIM), np.float32)
    gallery = Gallery.load(options.real)
    return gallery.codes(gallery.ids[:most])


def _exact_turns(
    gallery: Gallery,
    codes: torch.Tensor,
    indexes: list[faiss.IndexFlatIP],
    queries: np.ndarray,
    repeats: int,
    clock: Callable[[], float],
) -> tuple[dict[str, list[float]], float]:
    unit = torch.from_numpy(gallery.unit_queries(queries)).transpose(0, 1).contiguous()
    contenders: dict[str, Callable[[], object]] = {
        "ours": lambda: gallery.search(queries, K),
        "faiss": lambda: faiss_search(gallery, queries, K, indexes=indexes),
    }
    if len(queries) == 1:
        contenders["bandwidth"] = lambda: [layer.sum() for layer in codes]
    else:
        contenders["gemm"] = lambda: [torch.mm(u, layer.T) for u, layer in zip(unit, codes, strict=True)]
    times = take_turns(contenders, repeats, clock)
    most, _, least, _ = faiss_search(gallery, queries, K, indexes=indexes)
    ours = gallery.search(queries, K)
    return times, float(np.mean(ours.most_ids == most) + np.mean(ours.least_ids == least)) / 2


def exact_table(rows: list[dict[str, Any]]) -> str:
    """A line a size; the bound is the bare product, for one query reading the codes once."""
    lines = [("codes", "layers", "batch", "ours, ms", "FAISS x 2, ms", "times FAISS", "bound, ms", "of it", "same ids")]
    for row in rows:
        bound = "bandwidth" if row["batch"] == 1 else "gemm"
        milliseconds = [number(row[name], 1, 1e3) for name in ("ours", "faiss", bound)]
        shares = number(row[f"vs_{bound}"]), f"{row['same_ids_as_faiss']:.2%}"
        lines.append((row["count"], row["layers"], row["batch"], *milliseconds[:2], number(row["vs_faiss"], 1),
                      f"{milliseconds[2]} ({bound})", *shares))  # fmt: skip
    return aligned(lines, *[">"] * 9)


def largest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each batch of interest, the numbers of its largest size, which stands for all."""
    found = {}
    for batch, bound in ((64, "gemm"), (1, "bandwidth")):
        of_batch = [row for row in rows if row["batch"] == batch]
        if of_batch:
            row = max(of_batch, key=lambda r: r["count"] * r["layers"])
            keys = ("count", "layers", "threads", "clock", "vs_faiss", f"vs_{bound}")
            found[f"exact_b{batch}"] = {"seconds": row["ours"], **{key: row[key] for key in keys}}
    return found


# ---- compressed ------------------------------------------------------------------------------------------------------


def compressed(options: argparse.Namespace, folder: Path, clock: Callable[[], float]) -> dict[str, Any]:
    """Build, then a row for each number of probed lists."""
    count = options.million
    source, plan = source_codes(options, count), choose(count, DIM, recall=0.95)
    if options.factory:
        plan = Plan(options.factory, "nprobe=64", options.candidates, plan.train)

    def batches() -> Iterator[CodeBatch]:
        for start in range(0, count, 8192):
            codes = np.array(source[start : start + 8192])[:, None]
            part = [f"synthetic-{i:07d}" for i in range(start, start + len(codes))]
            yield CodeBatch(codes, part, part)

    start = clock()
    info = build(folder / "million", batches(), weights=WEIGHTS, compression=plan, threads=options.threads)
    built, size = clock() - start, info.files[info.indexes[0]].size
    print(f"{plan}: built in {built:.0f} s", flush=True)
    queries, real = noisy(people(64, 1), 1), real_codes(options, 64)[:, :1]
    queries[: len(real)] = real
    full = Gallery.load(folder / "million")
    small = Gallery.load(folder / "million", search="compressed")
    truth = full.rank(queries, K, K)
    rows = [_probed(full, small, probe, queries, truth, len(real), options.repeats, clock) for probe in PROBES]
    good = [row for row in rows if min(row["recall_most"], row["recall_least"]) >= 0.95] or [rows[-1]]
    best = max(good, key=lambda row: row["b64"]["speedup"])

    def scaled(times: float) -> dict[str, float]:
        return {"build_seconds": built * times, "index_bytes": size * times}

    return {
        "count": count,
        "plan": plan.as_json(),
        "build_seconds": built,
        "index_bytes": size,
        "recall_at_10": min(best["recall_most"], best["recall_least"]),
        "nprobe": best["nprobe"],
        "speedup": best["b64"]["speedup"],
        "speedup_b1": best["b1"]["speedup"],
        "memory_ratio": count * DIM * 4 / size,
        "scaled_on_paper": {"16_layers": scaled(16), "16_layers_100_million": scaled(16 * 100e6 / count)},
        "curve": rows,
    }


def _probed(
    full: Gallery, small: Gallery, probe: int, queries: np.ndarray, truth: tuple, real: int, repeats: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Recall and speed with so many lists probed; the first `real` queries are of photos."""
    small.compressed[0].tune(f"nprobe={probe}")
    ends = zip(truth, small.rank(queries, K, K), strict=True)
    # (2 ends, 64 queries): the share that is found
    hits = np.array([[np.isin(*pair).mean() for pair in zip(t[:, 0], f[:, 0], strict=True)] for t, f in ends])
    most, least = hits.mean(1).tolist()
    row: dict[str, Any] = {"nprobe": probe, "recall_most": most, "recall_least": least}
    if real:
        most, least = hits[:, :real].mean(1).tolist()
        row |= {"real_photos": real, "real_most": most, "real_least": least}
    for batch in (1, 64):
        turns = {name: partial(g.rank, queries[:batch], K, K) for name, g in (("exact", full), ("compressed", small))}
        times = take_turns(turns, max(2, repeats // 2), clock)
        row[f"b{batch}"] = {name: statistics.median(seconds) / batch for name, seconds in times.items()}
        row[f"b{batch}"]["speedup"] = ratio(times, "exact", "compressed")
    return row


def compressed_table(rows: list[dict[str, Any]]) -> str:
    """A line for each number of probed lists; recall@10 of the most and the least similar, and of real photos."""
    lines = [("lists", "recall most", "least", "photos", "one, ms", "times exact", "of 64, ms a face", "times exact")]
    for row in rows:
        recalls = [number(row[key], 3) for key in ("recall_most", "recall_least")]
        photos = ", ".join(number(row.get(key), 3) for key in ("real_most", "real_least"))
        alone, many = ((number(row[b]["compressed"], 2, 1e3), number(row[b]["speedup"], 1)) for b in ("b1", "b64"))
        lines.append((row["nprobe"], *recalls, photos, *alone, *many))
    return aligned(lines, *[">"] * 8)


# ---- nightly rebuild -------------------------------------------------------------------------------------------------


def rebuild(options: argparse.Namespace, folder: Path, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of a night's version with 1 % of the people changed, and of the same from nothing."""
    count, layers = options.people, options.rebuild_layers
    source = source_codes(options, count + count // 100)
    change = count // 200  # as many go as come

    def batches(first: int, last: int) -> Iterator[CodeBatch]:
        for start in range(first, last, 2048):
            stop = min(start + 2048, last)
            ids = [f"p{i:07d}" for i in range(start, stop)]
            codes = np.stack([np.roll(source[start:stop], layer, axis=1) for layer in range(layers)], axis=1)
            yield CodeBatch(codes, ids, ids)

    def fill(builder: GalleryBuilder, first: int = 0, last: int = count) -> None:
        for batch in batches(first, last):
            builder.add(batch)

    def timed(work: Callable[[], object]) -> float:
        start = clock()
        work()
        return clock() - start

    store, other = Store(folder / "nightly"), Store(folder / "nothing")
    first = timed(lambda: store.build("first", fill, weights=WEIGHTS, check=check))
    gone = np.random.default_rng(0).permutation(count)[:change]
    store.removed.add(people=[f"p{i:07d}" for i in gone])
    night = timed(lambda: store.update("night", batches(count, count + change), check=check))
    other.removed.add(people=[f"p{i:07d}" for i in gone])
    nothing = timed(
        lambda: other.build("all", lambda b: fill(b, 0, count + change), weights=WEIGHTS, check=check)
    )
    checked = timed(lambda: check(store.version(store.current()), store.info(store.current())))
    return {
        "people": count,
        "layers": layers,
        "changed": 2 * change,
        "first_seconds": first,
        "night_seconds": night,
        "from_nothing_seconds": nothing,
        "check_seconds": checked,
        "codes_after": store.info(store.current()).count,
    }


# ---- the command -----------------------------------------------------------------------------------------------------


def measure(part: str, options: argparse.Namespace, folder: Path, result: dict[str, Any], about: dict) -> None:
    """Measure a part, say what was found, and put it into `result`."""
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    if part == "exact":
        rows = exact(options, clock)
        print(exact_table(rows))
        measured = {_size(row) for row in rows}
        before = result.get("exact", {}).get("rows", [])
        rows = sorted([row for row in before if _size(row) not in measured] + rows, key=_size)
        result["exact"] = about | {"k": K, "repeats": options.repeats, "rows": rows}
        result |= largest(rows)
    elif part == "compressed":
        result["compressed"] = about | compressed(options, folder, clock)
        print(compressed_table(result["compressed"]["curve"]))
    else:
        result["rebuild"] = about | rebuild(options, folder, clock)
        print(", ".join(f"{k} {v:.4g}" for k, v in result["rebuild"].items() if isinstance(v, int | float)))
    result.setdefault("peak_megabytes", {})[part] = peak = peak_memory() / 2**20
    print(f"{part}: peak memory of the process so far {peak:.0f} MiB")


def main(arguments: list[str] | None = None) -> None:
    options = parse(
        "gallery", __doc__, arguments,
        only={"action": "append", "choices": PARTS, "help": "these parts; repeatable [default: all]"},
        counts=([20_000, 200_000], "codes a layer (exact)"), layers=([4, 16], ""), batches=([1, 64, 256], ""),
        million=(1_000_000, "codes of the compressed layer"),
        factory={"help": "another FAISS index than the tuner's choice"},
        candidates=(100, "of --factory, scored exactly"),
        people=(200_000, "of the nightly rebuild"), rebuild_layers=(4, ""),
        codes={"help": ".npy of W codes (N, 512) float32, made by the mapping network before"},
        real={"help": "gallery of real photos, whose codes are the first queries"},
        repeats=(5, ""), threads=(len(os.sched_getaffinity(0)), ""),
        clock={"choices": ("wall", "cpu"), "default": "wall", "help": "cpu: processor seconds of this process, for a "
               "machine that others use too (with --threads 1)"},
    )  # fmt: skip
    set_up(options.threads)
    faiss.omp_set_num_threads(options.threads)
    result = recorded(options.out)
    about = {"machine": machine(), "threads": options.threads, "clock": options.clock, "load": os.getloadavg()}
    print(f"{machine_line()}; {options.threads} threads, {options.clock} time")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as folder:
        for part in options.only or PARTS:
            measure(part, options, Path(folder), result, about)
            record(options.out, result)


if __name__ == "__main__":
    main()
