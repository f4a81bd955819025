"""Mean W of the embedded mapping network: ``python -m pipelines.training.mean_code OUT``."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file

from scol_ops.models.embedded import load_mobilestylegan
from scol_ops.models.mobilestylegan import CODE_DIM


def main(out: str) -> None:
    """Average 65,536 codes of seed 0 in float64 and write ``mean_code``, (512,) float32, as safetensors."""
    mapping = load_mobilestylegan(256).mapping
    rng = torch.Generator().manual_seed(0)
    total = torch.zeros(CODE_DIM, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(16):
            total += mapping(torch.randn(4096, CODE_DIM, generator=rng)).double().sum(0)
    save_file({"mean_code": (total / 65536).float()}, out)


if __name__ == "__main__":
    main(sys.argv[1])
