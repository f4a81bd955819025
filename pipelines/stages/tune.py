"""Stage ``tune``: tune the generator around the fused code, then refine the residual in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cluster import Operator
from pipelines import models
from pipelines.config import Config, Section
from pipelines.stages.common import Row, as_codes, decode_png, each_face, encode_png, geometry_in_crop, photo_side
from scol_ops.metrics import psnr, ssim, to_uint8
from scol_ops.paste import face_mask
from scol_ops.refinement import RefineSettings, refine
from scol_ops.tuning import TuneResult, TuneSettings, tune


def settings_of(kind: type, section: Section):
    """An operator's settings from the section that has fields of the same names."""
    return kind(**{field.name: getattr(section, field.name) for field in fields(kind)})


class Refiner:
    """Refinement of one face, as the configuration says.

    Args:
        device: where the features' networks are loaded, and for the id-lock the generator.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config, self._device, store = config, device, config.engine.models
        models.load_features(config.refine.identity, device, config.encoder, store)
        self._generator = models.generator(config.generator, device, store) if config.refine.id_lock else None

    def __call__(
        self,
        row: Row,
        fused: np.ndarray | None,
        picture: Tensor,
        original: Tensor,
        mask: Tensor,
        margins: Sequence[float],
        settings: RefineSettings,
        seed: int,
        deadline: float,
    ) -> TuneResult:
        """Refine a picture (1, 3, S, S) of the face of a row with ``align``'s geometry.

        Args:
            fused: the face's fused code, a manifest's vector; needed for the id-lock alone.
            picture, original, mask, margins, settings, seed, deadline: see ``refine``.
        """
        config, device = self._config, self._device
        landmarks, box = geometry_in_crop(row, config.crop_size, device, "align.")
        identity = [
            models.identity_feature(name, device, landmarks, box, config.encoder, config.engine.models)
            for name in config.refine.identity
        ]
        locked = None
        if self._generator is not None:
            with torch.no_grad():
                first = self._generator(as_codes(fused, device)).clamp(-1, 1)
                locked = [feature(first) for feature in identity]
        return refine(
            picture,
            original,
            mask,
            identity,
            margins,
            locked,
            settings,
            seed=seed,
            deadline=deadline,
            photo_side=photo_side(row, "align."),
        )


def operator(config: Config, weights: str) -> Operator:
    """Loads the networks; the result takes rows of ``fuse`` with ``align.crop`` and the face's geometry."""
    models.set_up()
    device = models.pick_device(config.engine.device)
    store = config.engine.models
    generator = models.generator(config.generator, device, store)
    models.load_features(config.tune.identity, device, config.encoder, store)
    refiner = Refiner(config, device) if config.refines else None
    perceptual = None if config.tune.perceptual == "ssim" else models.perceptual(config.tune.perceptual, device, store)
    tuning, refining = settings_of(TuneSettings, config.tune), settings_of(RefineSettings, config.refine)

    def treat(row: Row, deadline: float) -> Row:
        face, fused = decode_png(row["align.crop"], device), as_codes(row["fused"], device)
        landmarks, box = geometry_in_crop(row, config.crop_size, device, "align.")
        mask = face_mask(landmarks, config.crop_size)
        tuned = tune(
            generator,
            fused,
            face,
            mask,
            [models.identity_feature(n, device, landmarks, box, config.encoder, store) for n in config.tune.identity],
            config.tune.margin_of_each(),
            tuning,
            seed=row["seed"],
            deadline=deadline,
            perceptual=perceptual,
        )
        refined = TuneResult(tuned.picture, 0, 0.0)
        if refiner is not None:
            margins, seed = config.refine.margin_of_each(), row["seed"] ^ 1
            refined = refiner(row, row["fused"], tuned.picture, face, mask, margins, refining, seed, deadline)
        original, after = to_uint8(face[0]), to_uint8(refined.picture[0])
        return {
            "tuned": encode_png(tuned.picture),
            "refined": encode_png(refined.picture) if refined.steps else None,
            "psnr": psnr(original, after),
            "ssim": ssim(original, after),
            "tuned_psnr": psnr(original, to_uint8(tuned.picture[0])),
            "tune_steps": tuned.steps,
            "refine_steps": refined.steps,
            "tune_seconds": tuned.seconds,
            "refine_seconds": refined.seconds,
            "history": _history("tune", tuned) + _history("refine", refined),
        }

    return partial(each_face, "tune", weights=weights, limit=config.engine.face_seconds, treat=treat)


def _history(phase: str, result: TuneResult) -> list[Row]:
    names = ("psnr", "reconstruction", "id_lock", "hinge")
    return [
        {"phase": phase, "step": step} | {name: losses.get(name) for name in names}
        for step, losses in enumerate(result.history)
    ]
