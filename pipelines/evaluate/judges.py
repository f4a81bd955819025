"""The recognisers that an evaluation may ask, by name: the one place where it gets them from."""

from __future__ import annotations

import torch

from pipelines import models
from scol_ops.models.recognisers import RECOGNISERS, Recogniser


def available() -> tuple[str, ...]:
    """Names of the recognisers whose weights are here."""
    return RECOGNISERS


def load(name: str, device: torch.device | str = "cpu") -> Recogniser:
    """One of `available`, once a process; raises WeightsError where its file is missing or altered."""
    return models.recogniser(name, torch.device(device))


def fingerprint(name: str) -> str:
    """16 hex digits of its weights."""
    return models.recogniser_fingerprint(name)
