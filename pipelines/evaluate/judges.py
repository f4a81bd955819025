"""The networks that an evaluation may ask, by name: the one place where it gets them from."""

from __future__ import annotations

import torch
from torch import nn

from pipelines import models, public_models
from pipelines.config import PERCEPTUAL_ORDER
from scol_ops.models.recognisers import RECOGNISERS, Recogniser


def available(store: str | None = None) -> tuple[str, ...]:
    """Names of the recognisers whose weights are here: the embedded ones, then those of the model store.

    Args:
        store: URL of the model store (`scol models add`); None for the default one.
    """
    added = models.open_store(store)
    return (*RECOGNISERS, *(name for name in public_models.RECOGNISERS if added.has(name)))


def load(name: str, device: torch.device | str = "cpu", store: str | None = None) -> Recogniser:
    """One of `available`, once a process; raises WeightsError where its file is missing or altered."""
    return models.recogniser(name, torch.device(device), store)


def fingerprint(name: str, store: str | None = None) -> str:
    """16 hex digits of its weights."""
    return models.recogniser_fingerprint(name, store)


def lpips_name(store: str | None = None) -> str | None:
    """The LPIPS that the model store has, AlexNet's first; None for none."""
    added = models.open_store(store)
    return next((name for name in PERCEPTUAL_ORDER if added.has(name)), None)


def load_lpips(name: str, device: torch.device | str = "cpu", store: str | None = None) -> nn.Module:
    """`scol_ops.models.lpips_distance.LPIPSDistance`, once a process."""
    return models.perceptual(name, torch.device(device), store)


def lpips_fingerprint(name: str, store: str | None = None) -> str:
    """16 hex digits of its weights."""
    return models.open_store(store).record(name).fingerprint
