"""How many actors of each kind a cluster has room for, and what each of them needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster import Pool, Resources
from pipelines.config.sections import Config


# A generator, an encoder and two recognisers with their gradients: 1.5 GB at 256 px, more at 1024 px.
def _worker_bytes(size: int) -> int:
    return 2 * 2**30 if size <= 256 else 6 * 2**30


def layout(config: Config, nodes: Sequence[dict[str, float]]) -> dict[str, Pool]:
    """Pools for a cluster. Nearly all work is tuning, so the generators get the machines: one a GPU, or as many
    single-threaded ones as there are cores and memory for. The other pools are small and reserve nothing.

    Args:
        nodes: Ray resources of each live node: "CPU", "GPU", "memory" (bytes).
    """
    settings = config.engine
    cpus = max(1, int(sum(node.get("CPU", 0) for node in nodes)))
    gpus = 0 if settings.device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
    memory = sum(node.get("memory", 0) for node in nodes)
    if gpus:
        actors = settings.workers or gpus
        threads = settings.threads or max(1, min(4, cpus // actors))
    else:
        fitting = max(1, int(memory // _worker_bytes(config.crop_size))) if memory else cpus
        actors = settings.workers or min(cpus, fitting)
        threads = settings.threads or max(1, min(8, cpus // actors))
    generator = Resources(num_cpus=min(threads, cpus / actors), num_gpus=min(1.0, gpus / actors), threads=threads)
    small = Resources(num_cpus=0.0, threads=1)
    return {
        "generator": Pool(actors=actors, resources=generator),
        "gallery": Pool(actors=1, resources=Resources(num_cpus=0.0, threads=max(1, min(4, cpus // 2)))),
        "photos": Pool(actors=math.ceil(actors / 4), resources=small),
    }
