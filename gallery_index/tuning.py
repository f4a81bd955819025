"""Choosing how a gallery is searched, and saying what it will take before anything starts.

Times are counted from rates that are measured on this machine in a second or two (``measure``), memory from sizes.  The
choice follows what was measured on codes of the embedded generator (``docs/gallery.md``): centred W codes have most of
their variance in few directions, so a projection to a quarter to an eighth of the components loses next to nothing
that the exact scores of some hundred candidates do not bring back, and inverted lists save the rest of the work.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import torch

from gallery_index.compressed import Plan

_FLOAT = 4
_ID_BYTES = 200  # of a row's three ids, in lists and dictionaries of Python
_OVER_EXACT = 1.3  # time of the exact search over its bare product
#: (recall wanted at both ends, share of a million rows that the lists probed hold), from the curve in docs/gallery.md
_PROBED = ((0.8, 0.012), (0.9, 0.02), (0.95, 0.032), (0.98, 0.06), (1.0, 0.13))
_FEWER = 0.4  # fewer rows need a larger share: measured 0.1 at 60,000 for what 0.032 does at a million


@dataclass(frozen=True)
class Rates:
    """What a machine does, with the threads it has.

    Attributes:
        product: multiply-adds a second of a product with 64 queries.
        stream: bytes a second that a product with one query reads.
        disk: bytes a second that are written and hashed.
    """

    product: float
    stream: float
    disk: float

    @staticmethod
    def measure(rows: int = 20_000, dim: int = 512) -> Rates:
        """Takes about a second."""
        codes, queries = torch.randn(rows, dim), torch.randn(64, dim)

        def seconds(work) -> float:
            work()
            start = time.perf_counter()
            for _ in range(3):
                work()
            return (time.perf_counter() - start) / 3

        data = codes.numpy().tobytes()
        return Rates(
            product=rows * 64 * dim / seconds(lambda: queries @ codes.T),
            stream=rows * dim * _FLOAT / seconds(lambda: codes @ queries[:2].T),
            disk=len(data) / (3 * seconds(lambda: hashlib.sha256(data).digest())),
        )


@dataclass(frozen=True)
class Estimate:
    """What a gallery of this kind takes.

    Attributes:
        plan: of its compressed indexes; None for the exact search.
        disk_bytes: of a version.
        memory_bytes: of a process that searches it.
        build_memory_bytes: of the process that builds it.
        build_seconds: from codes to a finished version (inverting photos comes before).
        search_seconds: for one face at both ends and all layers, in batches of 64.
        single_seconds: for one face alone.
        recall: that is reckoned with at both ends; 1 where it is exact.
        why: of the choice, in words.
    """

    plan: Plan | None
    disk_bytes: int
    memory_bytes: int
    build_memory_bytes: int
    build_seconds: float
    search_seconds: float
    single_seconds: float
    recall: float
    why: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def choose(count: int, dim: int = 512, *, recall: float = 0.95, code_bytes: int | None = None) -> Plan:
    """A plan for one layer of N codes.

    Args:
        count: N.
        dim: D.
        recall: wanted at both ends, in (0, 1].
        code_bytes: at most so many a code in memory; None for no limit of its own.

    Raises:
        ValueError: N or the recall is out of range, or nothing is as small as that.
    """
    if count < 1 or not 0 < recall <= 1:
        raise ValueError(f"a plan needs codes and a recall in (0, 1], got {count} and {recall}")
    width = min(dim, 64) if count >= 1000 else dim  # a projection is not learnt from few
    quantiser = "SQ8"
    limit = math.inf if code_bytes is None else code_bytes - 8  # a list's ids
    if width > limit:
        quantiser = f"PQ{width // 2}x4fs" if width // 4 <= limit else ""
    if not quantiser:
        raise ValueError(f"no index is as small as {code_bytes} bytes a code; {width // 4 + 8} is the least")
    transform = f"PCA{width}," if width < dim else ""
    candidates = 100 if quantiser == "SQ8" else 300
    if count < 20_000:  # lists would be too short to pay
        return Plan(f"{transform}{quantiser.removesuffix('fs')}", "", candidates, min(count, 50_000))
    lists = 2 ** round(math.log2(4 * math.sqrt(count)))
    share = next(share for wanted, share in _PROBED if recall <= wanted)
    probe = max(1, min(lists, math.ceil(share * (1e6 / count) ** _FEWER * lists)))
    return Plan(f"{transform}IVF{lists},{quantiser}", f"nprobe={probe}", candidates, min(count, 40 * lists))


def estimate(
    count: int,
    layers: int,
    dim: int = 512,
    *,
    memory: int | None = None,
    recall: float = 0.95,
    stored_layers: int | None = None,
    plan: Plan | None = None,
    rates: Rates | None = None,
) -> Estimate:
    """What N codes of L layers take, exact where they fit into ``memory``, else compressed.

    Args:
        count, layers, dim: N, L, D.
        memory: bytes that a process that searches may take; None for whatever the exact search needs.
        recall: wanted at both ends, if it is compressed.
        stored_layers: 1 where one W a person stands for all layers; L by default.
        plan: compressed in this way, whatever the memory.
        rates: of the machine; measured by default.

    Raises:
        ValueError: as ``choose``; or not even the smallest index fits into the memory.
    """
    if count < 1 or layers < 1:
        raise ValueError(f"a gallery has codes and layers, got {count} and {layers}")
    stored = layers if stored_layers is None else stored_layers
    rates = rates or Rates.measure()
    codes = count * stored * dim * _FLOAT
    small = count * (_ID_BYTES + 8 * stored)  # ids and norms
    exact_memory = codes + small + (64 << 20) + 4 * count * stored
    if plan is None and (memory is None or exact_memory <= memory):
        why = "exact: it fits into the memory" if memory is not None else "exact: no limit on the memory was given"
        return Estimate(
            plan=None,
            disk_bytes=codes + small,
            memory_bytes=exact_memory,
            build_memory_bytes=(512 << 20) + small,
            build_seconds=2 * codes / rates.disk,
            search_seconds=_OVER_EXACT * count * layers * dim / rates.product,
            single_seconds=_OVER_EXACT
            * max(codes / rates.stream, (stored < layers) * count * layers * dim / rates.product),
            recall=1.0,
            why=why,
        )
    if plan is None:
        left = memory - small - (64 << 20)
        plan = choose(count, dim, recall=recall, code_bytes=max(1, left // (count * stored)))
    whole = f"{exact_memory / 1e9:.1f} GB" + (f", {memory / 1e9:.1f} GB were given" if memory is not None else "")
    return _compressed(plan, count, layers, dim, stored, recall, rates, f"the exact search would take {whole}")


def _compressed(
    plan: Plan, count: int, layers: int, dim: int, stored: int, recall: float, rates: Rates, why: str
) -> Estimate:
    """What compressed indexes take; arguments as of ``estimate``."""
    codes, small = count * stored * dim * _FLOAT, count * (_ID_BYTES + 8 * stored)
    index = faiss.index_factory(dim, plan.factory, faiss.METRIC_INNER_PRODUCT)
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    lists = inner.nlist if isinstance(inner, faiss.IndexIVF) else 0
    width = inner.d
    size = (index.sa_code_size() if hasattr(index, "sa_code_size") else width * _FLOAT) + (8 if lists else 0)
    probe = int(plan.search.partition("nprobe=")[2].split(",")[0] or 1) if lists else 0
    scanned = count * probe / lists if lists else count
    # Training is ten rounds over the sample; adding finds each row's list; FAISS scans codes at about the rate at which
    # a product reads them.
    work = (10 * plan.train + count) * lists * width + count * dim * width
    one = 2 * (
        (lists * width + dim * width) / rates.product
        + scanned * size * (1.5 if "fs" not in plan.factory else 0.5) / rates.stream
        + plan.candidates * dim * 8 * 4 / rates.stream
    )
    return Estimate(
        plan=plan,
        disk_bytes=2 * codes + small + count * stored * size,
        memory_bytes=small + count * stored * size + lists * width * _FLOAT * stored + (64 << 20),
        build_memory_bytes=(512 << 20) + small + count * size + plan.train * (dim + width) * _FLOAT,
        build_seconds=4 * codes / rates.disk + stored * work / rates.product,
        search_seconds=layers * one,
        single_seconds=layers * one,
        recall=recall,
        why=f"compressed: {why}",
    )


def words(found: Estimate) -> dict[str, str]:
    """An estimate for people."""

    def size(value: float) -> str:
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"

    def span(value: float) -> str:
        if value < 1:
            return f"{value * 1e3:.1f} ms"
        if value < 300:
            return f"{value:.0f} s"
        return f"{value / 60:.0f} min" if value < 18000 else f"{value / 3600:.1f} h"

    plan, index = found.plan, "none"
    if plan is not None:
        index = f"{plan.factory}, {plan.search or 'no parameters'}, {plan.candidates} candidates"
    return {
        "search": found.why,
        "index": index,
        "recall reckoned with": f"{found.recall:.2f} at both ends",
        "disk": size(found.disk_bytes),
        "memory to search": size(found.memory_bytes),
        "memory to build": size(found.build_memory_bytes),
        "time to build": f"{span(found.build_seconds)} from the codes on",
        "time of a face": f"{span(found.search_seconds)} in batches of 64, {span(found.single_seconds)} alone",
    }
