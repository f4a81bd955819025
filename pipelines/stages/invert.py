"""Stage ``invert``: face to W+ code."""

from __future__ import annotations

from functools import partial

import torch

from cluster import Operator, Stage
from pipelines.config.sections import Config
from pipelines.networks.fingerprints import INVERSION_RECOGNISER
from pipelines.networks.load import Networks
from pipelines.stages.crops import as_vector, decode_png, geometry_in_crop
from pipelines.stages.declaration import GEOMETRY, Setting, declared
from pipelines.stages.rows import Row, each_face
from scol_ops.inversion import InvertSettings, invert


def stage(setting: Setting) -> Stage:
    """Reads the crops of ``align``."""
    return declared("invert", setting, pool="generator", columns=["crop", *GEOMETRY])


def operator(config: Config, weights: str) -> Operator:
    """Loads the networks; the result takes rows of ``align``."""
    networks = Networks(config)
    device, encoder, generator = networks.device, networks.encoder, networks.generator
    recogniser = networks.recogniser(INVERSION_RECOGNISER)
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
