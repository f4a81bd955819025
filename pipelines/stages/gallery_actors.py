"""A gallery spread over actors of the cluster: `gallery_index` answers, `cluster` places and replaces."""

from __future__ import annotations

from functools import partial
from typing import Any

from cluster import Resources, Service
from gallery_index import Expectation, ShardedGallery, make_part


def _answerer(url: str, fingerprint: str, extents: list[Any], threads: int, number: int):
    """In the actor: load part ``number``."""
    import torch  # late: this is imported where no tensor is

    torch.set_num_threads(threads)
    return make_part(url, fingerprint, extents[number])


def open_sharded(
    url: str,
    shards: int,
    *,
    expect: Expectation | None = None,
    layers: int | None = None,
    address: str | None = None,
    threads: int = 1,
) -> ShardedGallery:
    """A gallery whose layers and rows are spread over ``shards`` actors; they end with the process that opened it.

    An actor that is lost is started anew and loads its part from the store again; the search waits for it.

    Args:
        url: of the gallery or store, such that all nodes reach it.
        expect, layers: see ``Gallery.load``.
        address: of the cluster; see ``cluster.Service``.
        threads: of one actor.

    Raises:
        GalleryError: see ``ShardedGallery``.
        EngineError: an actor could not be started.
    """

    def start(fingerprint: str, folder: str, extents: list[Any]):
        factory = partial(_answerer, folder, fingerprint, extents, threads)
        service = Service(factory, len(extents), resources=Resources(threads=threads), address=address)
        return service.ask

    return ShardedGallery(url, shards, start, expect=expect, layers=layers)
