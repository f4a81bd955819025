"""The embedded networks, loaded from their files."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from scol_ops.models.dlib_resnet import DlibResNet
from scol_ops.models.encoder import Encoder
from scol_ops.models.faceres import FaceRes
from scol_ops.models.files import SHA256, read_safetensors, read_verified
from scol_ops.models.mobilefacenet import MobileFaceNet
from scol_ops.models.mobilestylegan import MobileStyleGAN, state_dict_from_ir
from scol_ops.models.openvino_ir import read_constants
from scol_ops.models.recognisers import Recogniser
from scol_ops.models.swapper import Swapper

TRUNK_PREFIX = "face.network."  # entries of the encoder that are MobileFaceNet's own and are not stored twice


@functools.cache
def _mobilestylegan_state() -> dict[str, Tensor]:
    graphs = [
        read_constants(read_verified(f"random_face/{n}.xml"), read_verified(f"random_face/{n}.bin"), n)
        for n in ("MappingNetwork", "SynthesisNetwork")
    ]
    return state_dict_from_ir(*graphs)


def load_mobilestylegan(
    resolution: int = 256, head: str | None = "mobilestylegan_head256.safetensors"
) -> MobileStyleGAN:
    """The embedded generator, in eval mode, parameters frozen.

    Args:
        resolution: 256 or 1024.
        head: the distilled head's file (256 px only); None leaves the head uninitialised, for training it.

    Raises:
        WeightsError: see ``read_verified``.
        ValueError: another resolution.
    """
    generator = MobileStyleGAN(resolution)
    state = {
        k: v
        for k, v in _mobilestylegan_state().items()
        if resolution == 1024 or not k.startswith(("blocks.5", "blocks.6", "head."))
    }
    if resolution == 256:
        own = generator.head.state_dict() if head is None else read_safetensors(head)
        state |= {f"head.{k}": v for k, v in own.items()}
    state["mean_code"] = read_safetensors("mobilestylegan_mean.safetensors")["mean_code"]
    generator.load_state_dict(state, strict=True)
    return generator.eval().requires_grad_(False)


def load_encoder(device: torch.device | str = "cpu") -> Encoder:
    """The embedded encoder, in eval mode, parameters frozen.

    Raises:
        WeightsError: see ``read_verified``.
    """
    encoder = Encoder()
    state = read_safetensors("encoder.safetensors")
    state |= {f"{TRUNK_PREFIX}{k}": v for k, v in read_safetensors("mobilefacenet.safetensors").items()}
    # Counters of batch norm's training are not stored; they play no part in eval mode.
    state |= {k: v for k, v in encoder.state_dict().items() if k.endswith("num_batches_tracked")}
    encoder.load_state_dict(state, strict=True)
    return encoder.eval().requires_grad_(False).to(device)


def load_swapper(device: torch.device | str = "cpu") -> Swapper:
    """The swap oracle's mapper, in eval mode, parameters frozen.

    Raises:
        WeightsError: see ``read_verified``.
    """
    mapper = Swapper()
    mapper.load_state_dict(read_safetensors("swapper.safetensors"), strict=True)
    return mapper.eval().requires_grad_(False).to(device)


_CLASSES: dict[str, type[Recogniser]] = {
    "mobilefacenet": MobileFaceNet,
    "dlib_resnet": DlibResNet,
    "faceres": FaceRes,
}
RECOGNISERS: tuple[str, ...] = tuple(_CLASSES)


def load_recogniser(name: str, device: torch.device | str = "cpu") -> Recogniser:
    """An embedded recogniser, in eval mode, parameters frozen.

    Args:
        name: one of ``RECOGNISERS``.
        device: where to put it.

    Raises:
        ValueError: unknown name.
        WeightsError: see ``files.read_verified``.
    """
    if name not in _CLASSES:
        raise ValueError(f"unknown recogniser {name!r}; there are {', '.join(RECOGNISERS)}")
    network = _CLASSES[name]()
    network.load_state_dict(read_safetensors(f"{name}.safetensors"), strict=True)
    network.fingerprint = SHA256[f"{name}.safetensors"][:16]
    return network.eval().requires_grad_(False).to(device)
