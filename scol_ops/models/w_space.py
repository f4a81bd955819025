"""Whether two mapping networks lead to the same W: galleries, encoders and generators of one W can be combined.

Nothing in a file says which training it comes from, so the networks are asked: both map the same few z, and where they
agree to two percent (exported copies differ by rounding, other trainings altogether) it is the same space.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 0.02
_COUNT, _DIM, _SEED = 8, 512, 20_260_101


@torch.inference_mode()
def probe(mapping: Callable[[Tensor], Tensor]) -> Tensor:
    """(8, 512) float32 on the CPU: what a mapping network makes of eight fixed z (NumPy's PCG64)."""
    z = np.random.default_rng(_SEED).standard_normal((_COUNT, _DIM), dtype=np.float32)
    return mapping(torch.from_numpy(z)).float().cpu().clone()


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether two probes are of one W space."""
    if one.shape != other.shape:
        return False
    return float((one - other).abs().max()) <= TOLERANCE * float(one.abs().max())


@torch.inference_mode()
def spread(mapping: Callable[[Tensor], Tensor], count: int = 4096) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (512,) each of W over ``count`` random z of seed 0."""
    z = torch.from_numpy(np.random.default_rng(0).standard_normal((count, _DIM), dtype=np.float32))
    w = torch.cat([mapping(part) for part in z.split(1024)]).double()
    return w.mean(0).float(), w.std(0).float()
