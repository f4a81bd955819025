"""Stage ``invert``: face to W+ code."""

from __future__ import annotations

from functools import partial

import torch

from cluster import Operator
from pipelines.config.sections import Config
from pipelines.networks import fingerprints
from pipelines.networks import load as networks
from pipelines.stages.crops import as_vector, decode_png, geometry_in_crop
from pipelines.stages.rows import Row, each_face
from scol_ops.inversion import InvertSettings, invert


def operator(config: Config, weights: str) -> Operator:
    """Loads the networks; the result takes rows of ``align``."""
    networks.set_up()
    device = networks.pick_device(config.engine.device)
    store = config.engine.models
    encoder, generator = networks.encoder(device, config.encoder, store), networks.generator(config.generator, device, store)
    recogniser = networks.recogniser(fingerprints.INVERSION_RECOGNISER, device)
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
