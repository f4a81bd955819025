"""The networks that an evaluation may ask, by name, the one place where it gets them from; and which may judge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pipelines.config.names import CEILING, EMBEDDED, ENCODER, PERCEPTUAL_ORDER, trunk_of
from pipelines.networks import fingerprints
from pipelines.networks import load as networks
from pipelines.run.folder import Run, RunError
from scol_ops.models import catalogue as public_models
from scol_ops.models.embedded import RECOGNISERS
from scol_ops.models.recognisers import Recogniser


def available(store: str | None = None) -> tuple[str, ...]:
    """Names of the recognisers whose weights are here: the embedded ones, then those of the model store.

    Args:
        store: URL of the model store (`scol models add`); None for the default one.
    """
    added = fingerprints.open_store(store)
    return (*RECOGNISERS, *(name for name in public_models.RECOGNISERS if added.has(name)))


def load(name: str, device: torch.device | str = "cpu", store: str | None = None) -> Recogniser:
    """One of `available`, once a process; raises WeightsError where its file is missing or altered."""
    return networks.recogniser(name, torch.device(device), store)


def fingerprint(name: str, store: str | None = None) -> str:
    """16 hex digits of its weights."""
    return fingerprints.recogniser_fingerprint(name, store)


def lpips_name(store: str | None = None) -> str | None:
    """The LPIPS that the model store has, AlexNet's first; None for none."""
    added = fingerprints.open_store(store)
    return next((name for name in PERCEPTUAL_ORDER if added.has(name)), None)


def load_lpips(name: str, device: torch.device | str = "cpu", store: str | None = None) -> nn.Module:
    """`scol_ops.models.lpips_distance.LPIPSDistance`, once a process."""
    return networks.perceptual(name, torch.device(device), store)


def lpips_fingerprint(name: str, store: str | None = None) -> str:
    """16 hex digits of its weights."""
    return fingerprints.open_store(store).record(name).fingerprint


def inside_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Recognisers that a configuration of `scol protect` works through, its encoder's trunk among them."""
    used = list(config["tune"]["identity"]) if config["tune"]["steps"] else []
    used += config["refine"]["identity"] if config["refine"]["steps"] else []
    used += [ENCODER] if config["attack"]["enabled"] else []
    used += [CEILING] if config["fuse"].get("identity_ceiling") is not None else []
    return tuple(sorted({trunk_of(config.get("encoder", EMBEDDED)) if name == ENCODER else name for name in used}))


def inside_of_run(url: str) -> tuple[str, ...] | None:
    """`inside_of` the configuration of a run; None where no run that can be read is there."""
    try:
        return inside_of(Run(url).read_json("run.json")["config"])
    except (RunError, KeyError, OSError):
        return None
