"""Style codes of people who do not exist.

Privacy: every code here is the image of a random vector under the generator's mapping network.  No
photo, no embedding and no code of a real person goes into it, and a gallery built from it can be
published, copied and kept without anybody's consent.  (The generator itself learned from photos of
real people; what it may remember of them is a property of its weights, not of these codes.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from gallery_index.builder import CodeBatch

_BATCH = 1024


def synthetic_codes(
    n: int,
    seed: int,
    mapping: Callable[[Tensor], Tensor],
    *,
    psi: float = 1.0,
    mean: Tensor | None = None,
    dim: int = 512,
) -> Iterator[CodeBatch]:
    """W codes of n synthetic people, for ``build(..., broadcast_layers=L)``: one W stands for all layers.

    Person i has the id ``synthetic-SEED-IIIIIII``, which is his photo id and person id too, and
    depends on seed and i alone: a larger n begins with the same people.

    Args:
        n: how many, at least 1.
        seed: of the random vectors z ~ N(0, I), drawn by NumPy's PCG64.
        mapping: z (b, dim) float32 to w (b, D) float32, on the CPU.
        psi: truncation, w := mean + psi (w - mean) (Karras et al., "A Style-Based Generator Architecture for
            GANs", arXiv:1812.04948, appendix B); 1 leaves the full variety.
        mean: (D,) mean code, needed where psi is not 1.
        dim: length of z.

    Yields:
        batches with codes (b, 1, D) float32.

    Raises:
        ValueError: n < 1, or psi without a mean.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if psi != 1.0 and mean is None:
        raise ValueError("truncation (psi other than 1) needs the mean code")
    rng = np.random.default_rng(seed)
    for start in range(0, n, _BATCH):
        # Always whole batches: a product's last bits may depend on the batch's size.
        z = torch.from_numpy(rng.standard_normal((_BATCH, dim), dtype=np.float32))
        with torch.inference_mode():
            w = mapping(z)[: n - start]
            if psi != 1.0:
                w = mean + psi * (w - mean)
        ids = [f"synthetic-{seed}-{i:07d}" for i in range(start, start + len(w))]
        yield CodeBatch(w[:, None].float().numpy(), ids, ids)
