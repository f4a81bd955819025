"""The networks that an evaluation may ask, by name: the one place where it gets them from."""

from __future__ import annotations

import torch
from torch import nn

from pipelines.config.names import PERCEPTUAL_ORDER
from pipelines.networks import fingerprints
from pipelines.networks import load as networks
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
