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
from scol_ops.attack import AttackSettings, attack
from scol_ops.inspection import inspect_components
from scol_ops.metrics import psnr, to_uint8
from scol_ops.paste import face_mask


def operator(config: Config, weights: str, std: np.ndarray | None) -> Operator:
    """Loads the encoder; the result takes rows of ``tune`` with the crop, the face's own code and its target."""
    models.set_up()
    device = models.pick_device(config.engine.device)
    settings = settings_of(AttackSettings, config.attack)
    scale = None if config.inspect.unit == "absolute" else torch.from_numpy(np.array(std, np.float32)).to(device)

    def look(faces: Tensor) -> Tensor:
        return models.encoder(device, config.encoder, config.engine.models)(models.at_encoder_size(faces))

    if config.attack.enabled:
        models.encoder(device, config.encoder, config.engine.models)

    def treat(row: Row, deadline: float) -> Row:
        data = row["refined"] or row["tuned"]
        face = decode_png(row["align.crop"], device)
        original = to_uint8(face[0])
        if not config.attack.enabled:
            return {"protected": data, "psnr": psnr(original, to_uint8(decode_png(data)[0]))}
        landmarks, _ = geometry_in_crop(row, config.crop_size, device, "align.")
        mask = face_mask(landmarks, config.crop_size)
        own, target = as_codes(row["invert.code"], device), as_codes(row["fuse.target"], device)
        inspection = inspect_components(own, target, config.inspect.tau, unit=config.inspect.unit, std=scale)
        result = attack(
            look,
            decode_png(data, device),
            inspection.target,
            inspection.mask,
            mask,
            settings,
            seed=row["seed"] ^ 2,
            deadline=deadline,
        )
        return {
            "protected": encode_png(result.picture),
            "psnr": psnr(original, to_uint8(result.picture[0])),
            "mask_share": float(inspection.share[0]),
            "loss_before": float(result.loss_before[0]),
            "loss_after": float(result.loss_after[0]),
        }

    return partial(each_face, "attack", weights=weights, limit=config.engine.face_seconds, treat=treat)
