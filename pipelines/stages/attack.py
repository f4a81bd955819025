"""Stage ``attack``: latent component inspection, then the identity inversion attack on the pixels."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from cluster import Operator
from pipelines import models
from pipelines.config import Config
from pipelines.stages.common import Row, as_codes, decode_png, each_face, encode_png, geometry_in_crop
from pipelines.stages.tune import settings_of
from scol_ops.attack import AttackResult, AttackSettings, attack
from scol_ops.inspection import inspect_components
from scol_ops.metrics import psnr, to_uint8
from scol_ops.paste import face_mask


class Attacker:
    """Inspection and attack of one face, as the configuration says.

    Args:
        std: (L, 512) of the gallery, where ``inspect.unit`` is ``std``.
        device: where the encoder is loaded.
    """

    def __init__(self, config: Config, std: np.ndarray | None, device: torch.device) -> None:
        self._inspect, self._device = config.inspect, device
        absolute = config.inspect.unit == "absolute"
        self._std = None if absolute else torch.from_numpy(np.array(std, np.float32)).to(device)
        self._encoder = models.encoder(device, config.encoder, config.engine.models)

    def _look(self, faces: Tensor) -> Tensor:
        return self._encoder(models.at_encoder_size(faces))

    def __call__(
        self, row: Row, picture: Tensor, mask: Tensor, settings: AttackSettings, seed: int, deadline: float
    ) -> tuple[AttackResult, float]:
        """Attack a picture (1, 3, S, S) of the face of a row with ``invert.code`` and ``fuse.target``.

        Returns:
            the result, and the share of the components that count as identity related.
        """
        own, target = as_codes(row["invert.code"], self._device), as_codes(row["fuse.target"], self._device)
        inspection = inspect_components(own, target, self._inspect.tau, unit=self._inspect.unit, std=self._std)
        result = attack(
            self._look, picture, inspection.target, inspection.mask, mask, settings, seed=seed, deadline=deadline
        )
        return result, float(inspection.share[0])


def operator(config: Config, weights: str, std: np.ndarray | None) -> Operator:
    """Loads the encoder; the result takes rows of ``tune`` with the crop, the face's own code and its target."""
    models.set_up()
    device = models.pick_device(config.engine.device)
    settings = settings_of(AttackSettings, config.attack)
    attacker = Attacker(config, std, device) if config.attack.enabled else None

    def treat(row: Row, deadline: float) -> Row:
        data = row["refined"] or row["tuned"]
        original = to_uint8(decode_png(row["align.crop"])[0])
        if attacker is None:
            return {"protected": data, "psnr": psnr(original, to_uint8(decode_png(data)[0]))}
        landmarks, _ = geometry_in_crop(row, config.crop_size, device, "align.")
        mask = face_mask(landmarks, config.crop_size)
        result, share = attacker(row, decode_png(data, device), mask, settings, row["seed"] ^ 2, deadline)
        return {
            "protected": encode_png(result.picture),
            "psnr": psnr(original, to_uint8(result.picture[0])),
            "mask_share": share,
            "loss_before": float(result.loss_before[0]),
            "loss_after": float(result.loss_after[0]),
        }

    return partial(each_face, "attack", weights=weights, limit=config.engine.face_seconds, treat=treat)
