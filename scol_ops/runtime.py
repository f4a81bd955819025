"""Process-wide settings that make PyTorch fast and repeatable on a CPU."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import nn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Let glibc reuse large freed blocks instead of returning each to the kernel.

    PyTorch's CPU allocator frees every activation; above 32 MB glibc maps each one afresh and the
    page faults dominate: generator forward+backward on a batch of 4 took 1.55 s an image without
    and 0.52 s with this setting (one thread of an EPYC 9004, 2026-11-24).  Peak memory stays the same.

    Returns:
        True where the setting was taken (glibc), False elsewhere.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))


def computes_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16. Elsewhere PyTorch emulates it: two steps of tuning at 256 px took
    48 s instead of 3.6 s (one thread of an EPYC without AVX-512, 2026-11-28).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def channels_last(network: nn.Module) -> nn.Module:
    """Kernels of convolutions in the order that GPUs' tensor cores take without rearranging; the results' bits may
    differ.

    ``Module.to(memory_format=...)`` would do for all but StyleGAN2, whose published kernels have five dimensions: there
    the feature maps alone are rearranged, and the convolutions follow them.
    """
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if hasattr(network, "memory_format"):
        network.memory_format = torch.channels_last
    return network


def set_up(threads: int | None = None) -> None:
    """Settings for a process that runs networks: allocator, thread count, no TF32.

    Args:
        threads: intra-op threads for PyTorch; None leaves its default (all cores).
    """
    keep_freed_memory()
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
