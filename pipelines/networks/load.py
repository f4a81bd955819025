"""Networks of a process: each is loaded once, by its name, or by the part that a run's configuration gives it
(`Networks`)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipelines.config.names import EMBEDDED, ENCODER, GENERATORS
from pipelines.config.sections import Config
from pipelines.networks.fingerprints import open_store, recogniser_fingerprint
from scol_ops import runtime
from scol_ops.losses import IdentityFeature
from scol_ops.models import catalogue as public_models
from scol_ops.models import embedded, recognisers

if TYPE_CHECKING:
    from scol_ops import detection

ENCODER_SIZE = 256


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
    return embedded.load_mobilestylegan(GENERATORS[name]).to(device)


@lru_cache(2)
def encoder(device: torch.device, name: str = EMBEDDED, store: str | None = None) -> nn.Module:
    """(B, 3, 256, 256) in [-1, 1] -> codes (B, L, 512); arguments and errors as of ``generator``."""
    return embedded.load_encoder(device) if name == EMBEDDED else _from_store(name, device, store)


@lru_cache(8)
def recogniser(name: str, device: torch.device, store: str | None = None) -> recognisers.Recogniser:
    """A recogniser by its name; arguments and errors as of ``generator``."""
    if name not in public_models.RECOGNISERS:
        return embedded.load_recogniser(name, device)
    network = _from_store(name, device, store)
    network.fingerprint = recogniser_fingerprint(name, store)
    return network


@lru_cache(1)
def perceptual(name: str, device: torch.device, store: str | None = None) -> nn.Module:
    """``lpips_distance.LPIPSDistance`` of a name of ``catalogue.PERCEPTUAL``; errors as of ``generator``."""
    return _from_store(name, device, store)


@lru_cache(2)
def detector(
    device: torch.device, min_face_size: float, min_confidence: float, max_side: int, batch_size: int
) -> detection.FaceDetector:
    """MTCNN; arguments as of ``detection.FaceDetector``. Raises WeightsError as ``generator``."""
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


class Networks:
    """The networks of a run on one device, by the parts that its configuration gives them.

    Nothing is loaded before it is asked for; a process loads each network once, whoever asks.

    Args:
        config: of the run, as ``resolve`` leaves it.
        device: where the networks are put; None for what ``engine.device`` says (``pick_device``).

    Raises:
        WeightsError, MissingModelError, ModelStoreError: by every method, see ``generator``.
    """

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        set_up()
        self._config, self._store = config, config.engine.models
        self.device = pick_device(config.engine.device) if device is None else device

    @property
    def generator(self) -> nn.Module:
        """Codes (B, L, 512) -> (B, 3, S, S) in about [-1, 1]."""
        return generator(self._config.generator, self.device, self._store)

    @property
    def encoder(self) -> nn.Module:
        """(B, 3, 256, 256) in [-1, 1] -> codes (B, L, 512)."""
        return encoder(self.device, self._config.encoder, self._store)

    @property
    def judge(self) -> recognisers.Recogniser:
        """The recogniser that looks at saved files."""
        return self.recogniser(self._config.publish.judge)

    @property
    def perceptual(self) -> nn.Module | None:
        """The tuning's perceptual distance; None where it is SSIM."""
        name = self._config.tune.perceptual
        return None if name == "ssim" else perceptual(name, self.device, self._store)

    @property
    def detector(self) -> detection.FaceDetector:
        """The face detector with the run's bounds."""
        align, batch = self._config.align, self._config.engine.align_batch
        return detector(self.device, align.min_face_size, align.min_confidence, align.max_side, batch)

    def recogniser(self, name: str) -> recognisers.Recogniser:
        """A recogniser by its name."""
        return recogniser(name, self.device, self._store)

    def encode(self, faces: Tensor) -> Tensor:
        """Crops (B, 3, S, S) in [-1, 1] of any size -> codes (B, L, 512); differentiable."""
        return self.encoder(at_encoder_size(faces))

    def load_features(self, names: Iterable[str]) -> None:
        """Load the networks of ``features`` before the first face needs them."""
        for name in names:
            _ = self.encoder if name == ENCODER else self.recogniser(name)

    def features(self, names: Iterable[str], landmarks: Tensor, box: Tensor) -> list[IdentityFeature]:
        """Features of the id-lock for one face: each takes crops (B, 3, S, S) to unit vectors (B, D).

        Args:
            names: recognisers, or ``encoder``: its latent in standard units, so that no component outweighs the others.
            landmarks: (1, 5, 2) in pixels of the crop.
            box: (1, 4) in pixels of the crop.
        """
        return [self._feature(name, landmarks, box) for name in names]

    def _feature(self, name: str, landmarks: Tensor, box: Tensor) -> IdentityFeature:
        if name == ENCODER:
            network = self.encoder
            return lambda crops: recognisers.unit(network.normalised(at_encoder_size(crops)).flatten(1))
        network = self.recogniser(name)
        return lambda crops: network.embed_crops(crops, landmarks, box)
