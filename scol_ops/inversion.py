"""Encoder-based GAN inversion: aligned faces to W+ codes, with an optional refinement by gradient steps.

Encoder: in the manner of e4e (Tov et al. 2021, arXiv:2102.02766).  Refinement: Adam on the code itself, kept
near the encoder's answer (the II2S / hybrid scheme of Zhu et al. 2020, arXiv:2012.09036).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scol_ops.losses import reconstruction_loss
from scol_ops.tuning import DeadlineExceeded


@dataclass(frozen=True)
class InvertSettings:
    """refine_steps: Adam steps on the code after the encoder, 0 for the encoder alone (a step costs one forward
    and backward pass of the generator).  lr: its rate.  stay: weight of the mean squared distance to the encoder's
    code.
    """

    refine_steps: int
    lr: float
    stay: float


@dataclass
class InvertResult:
    """codes (B, L, 512); pictures (B, 3, S, S) = G(codes) in [-1, 1]; psnr (B,) in dB against the faces; seconds."""

    codes: Tensor
    pictures: Tensor
    psnr: Tensor
    seconds: float


def picture_psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR in dB of each of a batch of pictures (B, 3, S, S) in [-1, 1]; identical pictures give 120 dB."""
    mse = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp_min(4e-12))


@torch.enable_grad()  # see ``tuning.tune``
def invert(
    encoder: Callable[[Tensor], Tensor],
    faces: Tensor,
    generator: Callable[[Tensor], Tensor],
    settings: InvertSettings | None = None,
    deadline: float | None = None,
) -> InvertResult:
    """Codes whose pictures resemble the faces.

    Faces are treated one at a time, so that a face's code does not depend on its neighbours in the batch.

    Args:
        encoder: (B, 3, 256, 256) in [-1, 1] -> (B, L, 512).
        faces: (B, 3, S, S) in [-1, 1], FFHQ-aligned; S is the generator's resolution or the encoder's 256.
        generator: (B, L, 512) -> (B, 3, R, R).
        settings: see ``InvertSettings``; None: the encoder alone.
        deadline: ``time.monotonic()`` after which ``DeadlineExceeded`` is raised.

    Raises:
        ValueError: faces that are not square RGB batches.
        DeadlineExceeded: see ``deadline``.
        FloatingPointError: a code became NaN or infinite.
    """
    if faces.ndim != 4 or faces.shape[1] != 3 or faces.shape[-1] != faces.shape[-2]:
        raise ValueError(f"faces must be (B, 3, S, S), got {tuple(faces.shape)}")
    begin = time.monotonic()
    codes, pictures = [], []
    for face in faces.split(1):
        small = face
        if face.shape[-1] != 256:
            small = torch.nn.functional.interpolate(
                face, (256, 256), mode="bilinear", antialias=True, align_corners=False
            )
        with torch.no_grad():
            first = encoder(small)
        code = first
        if settings is not None and settings.refine_steps:
            code = first.clone().requires_grad_(True)
            optimiser = torch.optim.Adam([code], lr=settings.lr, betas=(0.9, 0.99))
            for step in range(settings.refine_steps):
                if deadline is not None and time.monotonic() > deadline:
                    raise DeadlineExceeded(f"inversion step {step} of {settings.refine_steps}")
                for group in optimiser.param_groups:  # linear to a tenth
                    group["lr"] = settings.lr * (1 - 0.9 * step / settings.refine_steps)
                picture = _at_size(generator(code), small)
                loss = reconstruction_loss(picture, small) + settings.stay * (code - first).square().mean()
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
            code = code.detach()
        if not torch.isfinite(code).all():
            raise FloatingPointError("the inverted code is not finite")
        with torch.no_grad():
            picture = generator(code).clamp(-1, 1)
        codes.append(code)
        pictures.append(picture)
    if not codes:
        raise ValueError("no faces to invert")
    out = torch.cat(pictures)
    return InvertResult(torch.cat(codes), out, picture_psnr(_at_size(out, faces), faces), time.monotonic() - begin)


def _at_size(picture: Tensor, like: Tensor) -> Tensor:
    if picture.shape[-1] == like.shape[-1]:
        return picture
    return torch.nn.functional.interpolate(
        picture, like.shape[-2:], mode="bilinear", antialias=True, align_corners=False
    )
