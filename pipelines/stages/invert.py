"""Stage ``invert``: face to W+ code."""

from __future__ import annotations

from functools import partial

import torch

from cluster import Operator
from pipelines import models
from pipelines.config import Config
from pipelines.stages.common import Row, as_vector, decode_png, each_face, geometry_in_crop
from scol_ops.inversion import InvertSettings, invert


def operator(config: Config, weights: str) -> Operator:
    """Loads the networks; the result takes rows of ``align``."""
    models.set_up()
    device = models.pick_device(config.engine.device)
    store = config.engine.models
    encoder, generator = models.encoder(device, config.encoder, store), models.generator(config.generator, device, store)
    recogniser = models.recogniser(models.INVERSION_RECOGNISER, device)
    settings = InvertSettings(**config.invert.model_dump())

    def treat(row: Row, deadline: float) -> Row:
        face = decode_png(row["crop"], device)
        landmarks, box = geometry_in_crop(row, config.crop_size, device)
        result = invert(encoder, face, generator, settings, deadline)
        with torch.no_grad():
            own = recogniser.embed_crops(face, landmarks, box)
            again = recogniser.embed_crops(result.pictures, landmarks, box)
        return {
            "code": as_vector(result.codes),
            "psnr": float(result.psnr[0]),
            "id_cosine": float((own * again).sum()),
            "identity": as_vector(own),
        }

    limit = config.engine.face_seconds
    return partial(each_face, "invert", weights=weights, limit=limit, treat=treat, layers=config.num_codes)
