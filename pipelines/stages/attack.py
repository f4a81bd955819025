"""Stage ``attack``: latent component inspection, then the identity inversion attack on the pixels."""

from __future__ import annotations

from functools import partial

import numpy as np

from cluster import Operator
from pipelines.config.sections import Config
from pipelines.networks import load as networks
from pipelines.stages.crops import decode_png, encode_png, geometry_in_crop
from pipelines.stages.rows import Row, each_face
from pipelines.stages.treatments import Attacker, settings_of
from scol_ops.attack import AttackSettings
from scol_ops.metrics import psnr, to_uint8
from scol_ops.paste import face_mask


def operator(config: Config, weights: str, std: np.ndarray | None) -> Operator:
    """Loads the encoder; the result takes rows of ``tune`` with the crop, the face's own code and its target."""
    networks.set_up()
    device = networks.pick_device(config.engine.device)
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
