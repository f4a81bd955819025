"""Codes to try, and a search by the definition in float64 NumPy that shares nothing with the code under test."""

from __future__ import annotations

import numpy as np


def random_codes(n, layers, dim, seed=0):
    """Codes with a large common mean, as W codes have."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(1, layers, dim)) * 0.5 + rng.normal(size=(n, layers, dim))).astype(np.float32)


def brute_force(codes, ids, queries, k, mode, excluded=None):
    """Codes (N, L, D), queries (B, L, D), excluded bool (B, N).

    Returns most ids and scores (B, L, k), least ids and scores (B, L).
    """
    x, q = codes.astype(np.float64), queries.astype(np.float64)
    if mode == "centred":
        mean = x.mean(axis=0)
        x, q = x - mean, q - mean
    if mode != "raw":
        x = x / np.sqrt((x**2).sum(axis=2, keepdims=True))
        q = q / np.sqrt((q**2).sum(axis=2, keepdims=True))
    batch, layers = q.shape[:2]
    most = np.empty((batch, layers, k), dtype=object), np.empty((batch, layers, k))
    least = np.empty((batch, layers), dtype=object), np.empty((batch, layers))
    for b in range(batch):
        rows = [i for i in range(len(ids)) if excluded is None or not excluded[b, i]]
        for layer in range(layers):
            # Copies of a code score equal: their products are summed in one order by einsum.
            score = np.round(np.einsum("nd,d->n", x[:, layer], q[b, layer]), 13)
            best = sorted(rows, key=lambda i: (-score[i], ids[i]))[:k]
            worst = min(rows, key=lambda i: (score[i], ids[i]))
            most[0][b, layer], most[1][b, layer] = [ids[i] for i in best], [score[i] for i in best]
            least[0][b, layer], least[1][b, layer] = ids[worst], score[worst]
    return *most, *least
