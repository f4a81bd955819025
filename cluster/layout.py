"""How pools of workers are fitted into a cluster."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.stage import Pool, Resources


@dataclass(frozen=True)
class PoolSize:
    """How a pool is laid out: number of actors, and what each reserves with Ray and is told to use."""

    actors: int
    num_cpus: float
    num_gpus: float
    threads: int


def size_pools(
    wanted: Mapping[str, Resources], settings: Mapping[str, Pool], nodes: Sequence[Mapping[str, float]]
) -> dict[str, PoolSize]:
    """Fit pools of actors into a cluster so that all of them can run at the same time.

    A pool that wishes for GPUs gets one actor for each GPU it may have (an equal share where several pools wish), or is
    laid out on cores where there is none. Pools on cores share them equally; each gets as many actors as its share has
    room for at `threads` each (default: the share, at most 4) and as fit its share of the memory. Where the sum of what
    is reserved exceeds the cluster, all reservations of that kind shrink by the same factor, to fractions if need be;
    then actors share cores, and none waits for ever.

    Args:
        wanted: by pool, what one actor needs.
        settings: by pool, what the user set; missing pools are laid out freely.
        nodes: Ray resources of each live node: "CPU", "GPU", "memory" (bytes).
    """
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    memory = sum(node.get("memory", 0.0) for node in nodes)
    largest = max((node.get("CPU", 0.0) for node in nodes), default=1.0)
    on_gpu = [name for name, need in wanted.items() if need.num_gpus > 0 and gpus > 0]
    on_cpu = [name for name in wanted if name not in on_gpu]
    share = max(1.0, cpus / max(1, len(on_cpu)))
    sizes: dict[str, PoolSize] = {}
    for name, need in wanted.items():
        actors = settings[name].actors if name in settings else None
        if name in on_gpu:
            threads = need.threads or max(1, min(4, int(cpus / max(1.0, gpus))))
            count = actors or max(1, int(gpus / len(on_gpu) / need.num_gpus + 1e-6))
            reserved = threads if need.num_cpus is None else need.num_cpus
            sizes[name] = PoolSize(count, reserved, need.num_gpus, threads)
        else:
            fair = share if actors is None else max(1.0, share / actors)
            threads = need.threads or int(max(1.0, min(4.0, fair, largest)))
            count = actors or max(1, int(share / threads + 1e-6))
            if actors is None and need.memory and memory:
                count = max(1, min(count, int(memory / len(wanted) / need.memory)))
            reserved = threads if need.num_cpus is None else need.num_cpus
            sizes[name] = PoolSize(count, reserved, 0.0, threads)
    cpu_factor = _factor(cpus, sum(size.actors * size.num_cpus for size in sizes.values()))
    gpu_factor = _factor(gpus, sum(size.actors * size.num_gpus for size in sizes.values()))
    return {
        name: PoolSize(
            size.actors, _shrink(size.num_cpus, cpu_factor), _shrink(size.num_gpus, gpu_factor), size.threads
        )
        for name, size in sizes.items()
    }


def _factor(have: float, want: float) -> float:
    # A cluster without cores of its own, as a head node that waits for its autoscaler, says nothing about sizes.
    return 1.0 if have <= 0 or want <= have else have / want


def _shrink(amount: float, factor: float) -> float:
    if factor == 1.0 or amount == 0:
        return amount
    amount *= factor
    return float(math.floor(amount)) if amount >= 1 else max(1e-4, math.floor(amount * 1e4) / 1e4)
