"""FAISS's own search behind the same call: what the exact search is measured and tested against."""

from __future__ import annotations

import faiss
import numpy as np

from gallery_index.errors import NotEnoughCodesError
from gallery_index.gallery import Gallery


def faiss_search(
    gallery: Gallery,
    codes: np.ndarray,
    k: int,
    *,
    indexes: list[faiss.IndexFlatIP] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Both ends by two ``IndexFlatIP`` searches a layer, with q and with -q; no exclusions.

    Scores are float32 products of float32 unit vectors, so near ties may come in another order than
    in ``Gallery.search``, and exact ties come in the order of the store.

    Args:
        gallery: a loaded gallery.
        codes: (B, L, D) float32.
        k: at most N.
        indexes: one a stored layer, to read them once for many searches.

    Returns:
        ids (B, L, k) and float32 scores (B, L, k) of the most similar, ids (B, L) and scores (B, L) of the least.

    Raises:
        QueryError: malformed codes.
        NotEnoughCodesError: k > N.
    """
    queries = gallery.unit_queries(codes)
    if k > len(gallery):
        raise NotEnoughCodesError(0, len(gallery), k, len(gallery))
    batch, layers, dim = queries.shape
    if indexes is None:
        indexes = [gallery.faiss_index(layer) for layer in range(gallery.info.stored_layers)]
    if gallery.info.broadcast:
        most, rows = indexes[0].search(queries.reshape(-1, dim), k)
        least, low = indexes[0].search(-queries.reshape(-1, dim), 1)
        most, rows = most.reshape(batch, layers, k), rows.reshape(batch, layers, k)
        least, low = least.reshape(batch, layers), low.reshape(batch, layers)
    else:
        pairs = [
            (index.search(q, k), index.search(-q, 1))
            for index, q in zip(indexes, (np.ascontiguousarray(queries[:, i]) for i in range(layers)), strict=True)
        ]
        most, rows = (np.stack([p[0][i] for p in pairs], axis=1) for i in (0, 1))
        least, low = (np.stack([p[1][i][:, 0] for p in pairs], axis=1) for i in (0, 1))
    return gallery.ids[rows], most, gallery.ids[low], -least
