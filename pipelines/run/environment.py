"""The machine and the packages that a run or a benchmark was made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from cluster.session import usable_cpus


def machine() -> dict[str, Any]:
    """The driver's machine, in words and numbers."""
    import torch  # late: it takes seconds, and `scol --help` needs none of it

    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
    except OSError:
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {"system": platform.platform(), "cpu": cpu, "cores": usable_cpus(), "memory_bytes": memory, "gpus": gpus}


def machine_line() -> str:
    """Processor, cores, GPUs, PyTorch and the load, in one line for a table's head."""
    import torch  # late: as above

    found = machine()
    gpus = f", {', '.join(found['gpus'])}" if found["gpus"] else ""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{found['cpu']}, {found['cores']} cores{gpus}, torch {torch.__version__}; load {load}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that results depend on."""
    names = (
        "scol",
        "torch",
        "torchvision",
        "numpy",
        "pyarrow",
        "pillow",
        "ray",
        "faiss-gpu",
        "faiss-cpu",
        "scikit-image",
        "flip-evaluator",
        "cvvdp",
        "facenet-pytorch",
        "random-face",
        "lpips",
    )
    found = {name: _version(name) for name in names}
    return {"python": platform.python_version(), **{k: v for k, v in found.items() if v is not None}}
