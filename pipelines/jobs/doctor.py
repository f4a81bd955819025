"""``scol doctor``: checks of the installation.

Packages are imported inside the checks: one that cannot be imported is the finding.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

from cluster import ray_session
from cluster.session import usable_cpus


def _python() -> str:
    return sys.version.split()[0]  # an older one does not come this far


def _torch_works() -> str:
    import torch  # late: one that cannot be imported is a finding

    x = torch.arange(4.0, requires_grad=True)
    (x * x).sum().backward()
    if x.grad.tolist() != [0.0, 2.0, 4.0, 6.0]:
        raise RuntimeError(f"wrong gradient {x.grad.tolist()}")
    return f"{torch.__version__}, {usable_cpus()} usable core(s)"


def _gpu() -> str:
    import torch  # late: one that cannot be imported is a finding

    if not torch.cuda.is_available():
        return "none; networks run on the CPU"
    names = []
    for i in range(torch.cuda.device_count()):
        torch.ones(8, device=f"cuda:{i}").sum().item()
        names.append(
            f"{torch.cuda.get_device_name(i)} {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        )
    return ", ".join(names)


def _ray_starts() -> str:
    import ray  # late: one that cannot be imported is a finding

    with ray_session(num_cpus=1):
        answer = ray.get(ray.remote(num_cpus=1)(lambda: 6 * 7).remote(), timeout=120)
    if answer != 42:
        raise RuntimeError(f"a task answered {answer}")
    return f"{ray.__version__}, a local one started and ran a task"


def _faiss_works() -> str:
    import faiss  # late: one that cannot be imported is a finding
    import numpy as np

    index = faiss.IndexFlatIP(4)
    index.add(np.eye(4, dtype=np.float32))
    if index.search(np.eye(4, dtype=np.float32), 1)[1][:, 0].tolist() != [0, 1, 2, 3]:
        raise RuntimeError("a search gave wrong neighbours")
    return faiss.__version__


def _weights() -> str:
    from pipelines.networks.cards import model_cards  # late: as PyTorch, which it needs

    cards = model_cards()
    bad = [f"{card.name}: {card.problem}" for card in cards if not card.found]
    if bad:
        raise RuntimeError("; ".join(bad))
    return f"{len(cards)} networks, {sum(card.size for card in cards) / 1e6:.0f} MB, sha256 as expected"


def _disk(out: str) -> str:
    free = shutil.disk_usage(out if os.path.isdir(out) else os.path.dirname(os.path.abspath(out))).free
    if free < 2**30:
        raise RuntimeError(f"{free / 2**20:.0f} MiB free, less than 1 GiB")
    return f"{free / 2**30:.1f} GiB free at {out}"


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if total < 3 * 2**30:
        raise RuntimeError(f"{total / 2**30:.1f} GiB, at least 3 GiB are needed")
    return f"{total / 2**30:.1f} GiB"


def doctor(out: str = ".") -> list[dict[str, Any]]:
    """Checks of the installation: name, ok, words.

    Args:
        out: where space on the disk is checked.
    """
    found = []
    for name, action in (
        ("python", _python),
        ("torch", _torch_works),
        ("gpu", _gpu),
        ("faiss", _faiss_works),
        ("weights", _weights),
        ("ray", _ray_starts),
        ("memory", _memory),
        ("disk", lambda: _disk(out)),
    ):
        try:
            found.append({"name": name, "ok": True, "words": action()})
        except Exception as error:  # whatever a broken installation raises is the finding
            found.append({"name": name, "ok": False, "words": f"{type(error).__name__}: {error}"})
    return found
