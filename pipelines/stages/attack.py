"""Stage ``attack``: latent component inspection, then the identity inversion attack on the pixels."""

from __future__ import annotations

from functools import partial

import numpy as np

from cluster import Operator, Stage
from pipelines.config.sections import Config
from pipelines.networks.load import Networks
from pipelines.stages.crops import allowed, decode_png, encode_png, geometry_in_crop
from pipelines.stages.declaration import GEOMETRY, Setting, declared
from pipelines.stages.rows import Row, each_face
from pipelines.stages.treatments import Attacker, settings_of
from scol_ops.attack import AttackSettings
from scol_ops.metrics import psnr, to_uint8


def stage(setting: Setting) -> Stage:
    """Reads the pictures of ``tune``. Each face has its own time limit."""
    joins = {"align": ["crop", *GEOMETRY], "invert": ["code"], "fuse": ["target"]}
    columns = ["tuned", "refined"]
    return declared(
        "attack", setting, setting.std, pool="generator", columns=columns, joins=joins, shard_items=setting.slow_shard
    )


def operator(config: Config, weights: str, std: np.ndarray | None) -> Operator:
    """Loads the encoder; the result takes rows of ``tune`` with the crop, the face's own code and its target."""
    networks = Networks(config)
    device = networks.device
    settings = settings_of(AttackSettings, config.attack)
    attacker = Attacker(config, std, networks) if config.attack.enabled else None

    def treat(row: Row, deadline: float) -> Row:
        data = row["refined"] or row["tuned"]
        original = to_uint8(decode_png(row["align.crop"])[0])
        if attacker is None:
            return {"protected": data, "psnr": psnr(original, to_uint8(decode_png(data)[0]))}
        landmarks, _ = geometry_in_crop(row, config.crop_size, device, "align.")
        mask = allowed(landmarks, config)
        result, share = attacker(row, decode_png(data, device), mask, settings, row["seed"] ^ 2, deadline)
        return {
            "protected": encode_png(result.picture),
            "psnr": psnr(original, to_uint8(result.picture[0])),
            "mask_share": share,
            "loss_before": float(result.loss_before[0]),
            "loss_after": float(result.loss_after[0]),
        }

    return partial(each_face, "attack", weights=weights, limit=config.engine.face_seconds, treat=treat)
