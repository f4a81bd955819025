"""Benchmark of the gallery: exact search, compressed search, nightly rebuild.

    python -m pipelines.bench.bench_gallery [--only exact] [--only compressed] [--only rebuild]

Codes come from the embedded mapping network; each layer holds them in an order of its own, as mixed styles or inverted
photos do.  Queries are codes of other people with noise at every layer, as an encoder's are, or codes of real photos
(``--real GALLERY``, built by ``scol gallery build PHOTOS``).  Contenders take turns in one process; a ratio is the
median over the turns of the ratio within the turn.

- ``exact``: both ends, k = 10, against two searches of FAISS's IndexFlatIP (q and -q), against the bare product
  (batches), and against reading the codes once from memory (one query).  16 layers of 200,000 are timed as four times four layers,
  and the times added, so that FAISS's copy fits beside ours.
- ``compressed``: one layer of a million codes: build time, recall of the ten most and the ten least similar, speed and
  memory beside the exact search, for a number of lists that are probed; also as a plot.
- ``rebuild``: a version of 200,000 people, then one with 1 % of them changed, against building that from nothing.

Writes build/bench/gallery.json; a part or size that is not run keeps its last result there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
from pipelines.run.environment import machine, machine_line
from scol_ops.models.embedded import load_mobilestylegan
from scol_ops.runtime import set_up

K = 10
DIM = 512
WEIGHTS = {"generator": "benchmark", "encoder": None}
PARTS = ("exact", "compressed", "rebuild")
PROBES = (8, 16, 32, 64, 128, 256, 512)


def take_turns(
    contenders: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each, turn by turn; one unmeasured round first."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            start = clock()
            run()
            if turn:
                times[name].append(clock() - start)
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """Median of the ratios of pairs."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def people(count: int, seed: int) -> np.ndarray:
    """W codes of synthetic people: (count, 512) float32."""
    codes = np.empty((count, DIM), np.float32)
    start = 0
    for batch in synthetic_codes(count, seed, load_mobilestylegan(256, head=None).mapping):
        codes[start : start + len(batch.codes)] = batch.codes[:, 0]
        start += len(batch.codes)
    return codes


def in_memory(codes: torch.Tensor) -> Gallery:
    """A gallery that was never written: codes (L, N, D)."""
    layers, count, dim = codes.shape
    mean = torch.stack([sum(part.double().sum(0) for part in layer.split(4096)) / count for layer in codes])
    lengths = np.stack(
        [
            torch.cat([norms(part, m, "centred") for part in layer.split(4096)]).numpy()
            for layer, m in zip(codes, mean, strict=True)
        ]
    )
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


def exact(options: argparse.Namespace, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """A row a size: seconds of each contender, and the ratios."""
    rows = []
    for count in options.counts:
        source = np.load(options.codes, mmap_mode="r")[:count] if options.codes else people(count, 0)
        for layers in options.layers:
            at_once = layers if count * layers <= 400_000 else 4
            sums: dict[int, dict[str, list[float]]] = {}
            same: dict[int, list[bool]] = {}
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
                    same.setdefault(batch, []).append(equal)
                    kept = sums.setdefault(batch, {name: [0.0] * options.repeats for name in times})
                    for name, seconds in times.items():
                        kept[name] = [a + b for a, b in zip(kept[name], seconds, strict=True)]
                del gallery, indexes, codes
            for batch, times in sums.items():
                rows.append(
                    {"count": count, "layers": layers, "batch": batch}
                    | {"threads": options.threads, "clock": options.clock}
                    | {name: statistics.median(seconds) for name, seconds in times.items()}
                    | {f"vs_{name}": ratio(times, name, "ours") for name in times if name != "ours"}
                    | {"same_ids_as_faiss": float(np.mean(same[batch]))}
                )
                print(_exact_line(rows[-1]), flush=True)
    return rows


def _size(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["clock"], row["threads"], row["count"], row["layers"], row["batch"]


def real_queries(options: argparse.Namespace, layers: int) -> np.ndarray:
    """As many queries as the largest batch needs, of real photos first where there are some."""
    wanted = max(options.batches)
    queries = noisy(people(wanted, 1), layers)
    if options.real:
        gallery = Gallery.load(options.real)
        codes = gallery.codes(gallery.ids[:wanted])
        queries[: len(codes)] = codes[:, :layers]
    return queries


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


def _exact_line(row: dict[str, Any]) -> str:
    bound = "bandwidth" if row["batch"] == 1 else "gemm"
    return (
        f"{row['count']:>8} x {row['layers']:>2} layers, B {row['batch']:>3}: ours {row['ours'] * 1e3:>8.1f} ms, "
        f"FAISS x 2 {row['faiss'] * 1e3:>9.1f} ms ({row['vs_faiss']:>5.1f} x), {bound} {row[bound] * 1e3:>8.1f} ms "
        f"({row['vs_' + bound]:.2f} of it), same ids {row['same_ids_as_faiss']:.2%}"
    )


# ---- compressed ------------------------------------------------------------------------------------------------------


def compressed(options: argparse.Namespace, folder: Path, clock: Callable[[], float]) -> dict[str, Any]:
    """Build, then a row for each number of probed lists."""
    count = options.million
    source = np.load(options.codes, mmap_mode="r")[:count] if options.codes else people(count, 0)
    plan = choose(count, DIM, recall=0.95)
    if options.factory:
        plan = Plan(options.factory, "nprobe=64", options.candidates, plan.train)
    ids = [f"synthetic-{i:07d}" for i in range(count)]

    def batches() -> Iterator[CodeBatch]:
        for start in range(0, count, 8192):
            part = ids[start : start + 8192]
            yield CodeBatch(np.array(source[start : start + 8192])[:, None], part, part)

    start = clock()
    info = build(folder / "million", batches(), weights=WEIGHTS, compression=plan, threads=options.threads)
    built = clock() - start
    print(f"{plan}: built in {built:.0f} s", flush=True)
    queries, real = noisy(people(64, 1), 1), 0
    if options.real:
        gallery = Gallery.load(options.real)
        real = min(64, len(gallery))
        queries[:real] = gallery.codes(gallery.ids[:real])[:, :1]
    full = Gallery.load(folder / "million")
    small = Gallery.load(folder / "million", search="compressed")
    truth = full.rank(queries, K, K)
    size = info.files[info.indexes[0]].size
    rows = []
    for probe in PROBES:
        small.compressed[0].tune(f"nprobe={probe}")
        found = small.rank(queries, K, K)
        # (2 ends, 64 queries): the share that is found
        hits = np.array(
            [
                [np.isin(a, b).mean() for a, b in zip(t[:, 0], f[:, 0], strict=True)]
                for t, f in zip(truth, found, strict=True)
            ]
        )
        mean = hits.mean(axis=1)
        row: dict[str, Any] = {"nprobe": probe, "recall_most": float(mean[0]), "recall_least": float(mean[1])}
        if real:
            row |= {"real_photos": real, "real_most": float(hits[0, :real].mean())}
            row["real_least"] = float(hits[1, :real].mean())
        for batch in (1, 64):
            part = queries[:batch]
            turns = {"exact": lambda q=part: full.rank(q, K, K), "compressed": lambda q=part: small.rank(q, K, K)}
            times = take_turns(turns, max(2, options.repeats // 2), clock)
            row[f"b{batch}"] = {name: statistics.median(seconds) / batch for name, seconds in times.items()}
            row[f"b{batch}"]["speedup"] = ratio(times, "exact", "compressed")
        rows.append(row)
        print(
            f"nprobe {probe:>4}: recall@10 {mean[0]:.3f} most, {mean[1]:.3f} least"
            + (f" (of {real} real photos {row['real_most']:.3f}, {row['real_least']:.3f}); " if real else "; ")
            + "; ".join(f"B {b}: {row[f'b{b}']['compressed'] * 1e3:.2f} ms a face, {row[f'b{b}']['speedup']:.1f} x"
                        for b in (1, 64)),
            flush=True,
        )  # fmt: skip
    good = [row for row in rows if min(row["recall_most"], row["recall_least"]) >= 0.95] or [rows[-1]]
    best = max(good, key=lambda row: row["b64"]["speedup"])
    layers, hundred = 16, 100e6 / count
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
        "scaled_on_paper": {
            "16_layers": {"build_seconds": built * layers, "index_bytes": size * layers},
            "16_layers_100_million": {
                "build_seconds": built * layers * hundred, "index_bytes": size * layers * hundred
            },
        },
        "curve": rows,
    }  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Recall against speed as SVG: both ends, batches of 64 and one face alone."""
    width, height, left, bottom = 640, 380, 60, 50
    speeds = [row[b]["speedup"] for row in rows for b in ("b1", "b64")]
    low, high = np.log10(min(speeds)) - 0.1, np.log10(max(speeds)) + 0.1
    floor = min(0.8, *(row[end] for row in rows for end in ("recall_most", "recall_least"))) - 0.02

    def place(speed: float, recall: float) -> str:
        x = left + (np.log10(speed) - low) / (high - low) * (width - left - 20)
        y = height - bottom - (recall - floor) / (1.005 - floor) * (height - bottom - 20)
        return f"{x:.1f},{y:.1f}"

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" font-family="sans-serif" font-size="12" {more}>{words}</text>'

    middle = 'text-anchor="middle"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for recall in np.arange(np.ceil(floor * 20) / 20, 1.001, 0.05):
        (x1, y), (x2, _) = (place(10**v, recall).split(",") for v in (low, high))
        parts += [f'<path d="M{x1},{y}H{x2}" stroke="#ddd"/>', text(left - 36, float(y) + 4, f"{recall:.2f}")]
    for speed in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        if low <= np.log10(speed) <= high:
            x, y = place(speed, floor).split(",")
            parts += [f'<path d="M{x},{y}V20" stroke="#ddd"/>', text(float(x), height - 32, f"{speed} x", middle)]
    names = {"recall_most": "most similar", "recall_least": "least similar"}
    batches = {"b64": "batches of 64", "b1": "one face alone"}
    for n, (batch, end) in enumerate((b, e) for b in batches for e in names):
        line = f'stroke="{("#1b6ca8", "#c0392b")[n % 2]}" stroke-width="2" fill="none"' + (
            ' stroke-dasharray="5 4"' if n // 2 else ""
        )
        points = [place(row[batch]["speedup"], row[end]) for row in rows]
        parts.append(f'<polyline points="{" ".join(points)}" {line}/>')
        parts += [f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3" {line}/>' for p in points]
        y = height - bottom - 80 + 18 * n
        parts.append(f'<path d="M{left + 10},{y}h30" {line}/>')
        parts.append(text(left + 46, y + 4, f"{names[end]}, {batches[batch]}"))
    parts.append(text(width / 2, height - 10, "speed beside the exact search", middle))
    parts.append(text(14, height / 2, "recall@10", f'{middle} transform="rotate(-90 14 {height / 2})"'))
    parts.append("</svg>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts) + "\n")


# ---- nightly rebuild -------------------------------------------------------------------------------------------------


def rebuild(options: argparse.Namespace, folder: Path, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of a night's version with 1 % of the people changed, and of the same from nothing."""
    count, layers = options.people, options.rebuild_layers
    source = np.load(options.codes, mmap_mode="r") if options.codes else people(count + count // 100, 0)
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="these parts; repeatable [default: all]")
    parser.add_argument("--counts", type=int, nargs="+", default=[20_000, 200_000], help="codes a layer (exact)")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--million", type=int, default=1_000_000, help="codes of the compressed layer")
    parser.add_argument("--factory", help="another FAISS index than the tuner's choice")
    parser.add_argument("--candidates", type=int, default=100, help="of --factory, scored exactly")
    parser.add_argument("--people", type=int, default=200_000, help="of the nightly rebuild")
    parser.add_argument("--rebuild-layers", type=int, default=4)
    parser.add_argument("--codes", help=".npy of W codes (N, 512) float32, made by the mapping network before")
    parser.add_argument("--real", help="gallery of real photos, whose codes are the first queries")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor seconds of this process, for a machine that others use too (with --threads 1)",
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/gallery.json"))
    parser.add_argument("--plot", type=Path, default=Path("build/bench/gallery-curve.svg"))
    options = parser.parse_args(arguments)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    set_up(options.threads)
    faiss.omp_set_num_threads(options.threads)
    parts = options.only or list(PARTS)

    options.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    about = {"machine": machine(), "threads": options.threads, "clock": options.clock, "load": os.getloadavg()}
    print(f"{machine_line()}; {options.threads} threads, {options.clock} time, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(dir=options.out.parent) as folder:
        for part in parts:
            if part == "exact":
                before = result.get("exact", {}).get("rows", [])
                rows = exact(options, clock)
                measured = {_size(row) for row in rows}
                rows = sorted([row for row in before if _size(row) not in measured] + rows, key=_size)
                result["exact"] = about | {"k": K, "repeats": options.repeats, "rows": rows}
                for batch, bound in ((64, "gemm"), (1, "bandwidth")):
                    of_batch = [row for row in rows if row["batch"] == batch]
                    if of_batch:  # the largest size stands for all; every row is in `exact`
                        row = max(of_batch, key=lambda r: (r["count"] * r["layers"]))
                        result[f"exact_b{batch}"] = {
                            "seconds": row["ours"], "count": row["count"], "layers": row["layers"],
                            "threads": row["threads"], "clock": row["clock"],
                            "vs_faiss": row["vs_faiss"], f"vs_{bound}": row[f"vs_{bound}"],
                        }  # fmt: skip
            elif part == "compressed":
                result["compressed"] = about | compressed(options, Path(folder), clock)
                plot(result["compressed"]["curve"], options.plot)
                print(f"plot written to {options.plot}")
            else:
                result["rebuild"] = about | rebuild(options, Path(folder), clock)
                print(", ".join(f"{k} {v:.4g}" for k, v in result["rebuild"].items() if isinstance(v, int | float)))
            peak = peak_memory() / 2**20
            result.setdefault("peak_megabytes", {})[part] = peak
            options.out.write_text(json.dumps(result, indent=1))
            print(f"{part}: peak memory of the process so far {peak:.0f} MiB; written to {options.out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
