"""Fingerprints of networks, and the weights that each stage's result depends on."""

from __future__ import annotations

from pipelines.config.names import EMBEDDED, ENCODER, ENCODER_TRUNK, GENERATORS, RECOGNISERS
from pipelines.config.sections import Config
from pipelines.networks.digests import (
    ENCODER_FILE,
    HEAD_FILE,
    MAPPING_FILES,
    MEAN_FILE,
    SYNTHESIS_FILES,
    digest_of,
    embedded_w_digest,
)
from pipelines.networks.store import ModelStore
from scol_ops.models import catalogue as public_models
from scol_ops.models import files as weights

# Measures the inversion's identity cosine. Fixed, so that another judge does not make every face be inverted again.
INVERSION_RECOGNISER = "mobilefacenet"


def open_store(url: str | None) -> ModelStore:
    """The model store at a URL; None for the default one."""
    return ModelStore(url)


def generator_fingerprint(name: str, store: str | None = None) -> str:
    """16 hex digits over the digests of a generator's files."""
    if name in public_models.GENERATORS:
        return open_store(store).record(name).fingerprint
    return digest_of(*MAPPING_FILES, *SYNTHESIS_FILES, MEAN_FILE, *((HEAD_FILE,) if GENERATORS[name] == 256 else ()))


def mapping_fingerprint(name: str = "mobilestylegan-256", store: str | None = None) -> str:
    """Of a generator's W space, which a synthetic gallery depends on: the two embedded ones share theirs, and so does
    a public one whose mapping network leads to the same W."""
    if name in public_models.GENERATORS:
        return open_store(store).record(name).w_fingerprint
    return embedded_w_digest()


def encoder_fingerprint(name: str = EMBEDDED, store: str | None = None) -> str:
    if name != EMBEDDED:
        return open_store(store).record(name).fingerprint
    return digest_of(ENCODER_FILE, f"{ENCODER_TRUNK}.safetensors")


def recogniser_fingerprint(name: str, store: str | None = None) -> str:
    if name in public_models.RECOGNISERS:
        return open_store(store).record(name).fingerprint
    return weights.SHA256[f"{name}.safetensors"][:16]


def _feature_fingerprints(names: tuple[str, ...], config: Config) -> list[str]:
    store = config.engine.models
    return [_encoder_words(config) if n == ENCODER else f"{n}:{recogniser_fingerprint(n, store)}" for n in names]


def _encoder_words(config: Config) -> str:
    name = ENCODER if config.encoder == EMBEDDED else config.encoder
    return f"{name}:{encoder_fingerprint(config.encoder, config.engine.models)}"


def stage_weights(config: Config, gallery: str, std: str = "") -> dict[str, str]:
    """By stage, the weights that its result depends on, as ``name:fingerprint`` joined by commas.

    Args:
        gallery: the gallery's fingerprint.
        std: fingerprint of the gallery's standard deviations where the inspection uses them.
    """
    from scol_ops import detection  # needs torchvision: a second and 160 MB that workers need not pay

    store = config.engine.models
    of_generator = f"{config.generator}:{generator_fingerprint(config.generator, store)}"
    of_encoder = _encoder_words(config)
    steering = dict.fromkeys((*config.tune.identity, *(config.refine.identity if config.refines else ())))
    judges = dict.fromkeys((*RECOGNISERS, config.publish.judge))
    judging = [f"{name}:{recogniser_fingerprint(name, store)}" for name in judges]
    tuning = [of_generator, *_feature_fingerprints(tuple(steering), config)]
    if config.tune.perceptual in public_models.PERCEPTUAL:
        tuning.append(f"{config.tune.perceptual}:{open_store(store).record(config.tune.perceptual).fingerprint}")
    attack = [of_encoder] if config.attack.enabled else []
    if std and config.attack.enabled:
        attack.append(f"gallery-std:{std}")
    strengthening: list[str] = []
    if config.has_stage("strengthen"):
        strengthening = [f"{config.publish.judge}:{recogniser_fingerprint(config.publish.judge, store)}"]
    if config.strengthen.rounds:
        locked = [of_generator] if config.refine.id_lock and config.refine.identity else []
        strengthening = [*locked, *_feature_fingerprints(config.refine.identity, config), *attack, *strengthening]
    return {
        "align": f"mtcnn:{detection.weights_fingerprint()}",
        "invert": ",".join([of_generator, of_encoder, *_feature_fingerprints((INVERSION_RECOGNISER,), config)]),
        "fuse": f"gallery:{gallery}",
        "tune": ",".join(tuning),
        "attack": ",".join(attack),
        "strengthen": ",".join(dict.fromkeys(strengthening)),
        "publish": ",".join(judging),
    }
