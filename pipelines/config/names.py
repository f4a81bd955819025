"""Names that a configuration may use: stages, networks, and what is known of them without loading any."""

from __future__ import annotations

from scol_ops.models import catalogue as public_models

STAGES = ("align", "invert", "fuse", "tune", "attack", "strengthen", "publish")
OPTIONAL = ("strengthen",)  # those of them that a run leaves out where its configuration has nothing for them to do
# Of the operators' behaviour: raise a stage's number when its results change, and its rows are made anew.
VERSIONS = {"align": "1", "invert": "2", "fuse": "1", "tune": "3", "attack": "1", "strengthen": "3", "publish": "3"}
NO_LOOP = ("strengthen.rounds=0", "strengthen.looks=0")  # settings that leave the closed loop out
RECOGNISERS = ("mobilefacenet", "dlib_resnet", "faceres")  # scol_ops.models.recognisers.RECOGNISERS, without torch
ENCODER = "encoder"
ENCODER_TRUNK = "mobilefacenet"  # the recogniser whose features the encoder reads (scol_ops.models.encoder)
CEILING = "mobilefacenet"  # whose cosine `fuse.identity_ceiling` bounds
E4E_TRUNK = "irse50"  # the recogniser that e4e's trunk was trained as
EMBEDDED = "embedded"
EMBEDDED_CODES = 16  # L of the embedded generator and encoder
GENERATORS = {"mobilestylegan-256": 256, "mobilestylegan-1024": 1024, **public_models.GENERATORS}
ENCODERS = (EMBEDDED, *public_models.ENCODERS)
ALL_RECOGNISERS = (*RECOGNISERS, *public_models.RECOGNISERS)
PERCEPTUAL_ORDER = ("lpips-alex", "lpips-vgg")  # what "auto" takes, first first: pivotal tuning's own is AlexNet's
# Where the hinge rests unless the configuration says otherwise: near the mean cosine of different people, which is far
# from 0 for two of the networks (their cards in scol_ops/models/data).
# Those of public recognisers are what their training makes of different people; they have not been measured here.
MARGINS = {"mobilefacenet": 0.0, "dlib_resnet": 0.75, "faceres": 0.35, ENCODER: 0.0}
MARGINS |= dict.fromkeys(public_models.RECOGNISERS, 0.0)
# Of the refinement, which alone decides what stays: well beyond different people, since what a network that takes part
# is moved reaches others only in part (measured on 8 development faces: docs/results.md).
REFINE_MARGINS = {"mobilefacenet": -0.5, "dlib_resnet": 0.5, "faceres": 0.1, ENCODER: -0.3}
REFINE_MARGINS |= dict.fromkeys(public_models.RECOGNISERS, -0.3)


def trunk_of(encoder: str) -> str:
    """The recogniser that an encoder reads the features of, or was made from."""
    return ENCODER_TRUNK if encoder == EMBEDDED else E4E_TRUNK


def codes_of_encoder(name: str) -> int:
    """L of an encoder's codes."""
    return EMBEDDED_CODES if name == EMBEDDED else public_models.codes_of(public_models.ENCODERS[name])
