"""Weights files: each has a sha256 here, and a file that differs is refused. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

DATA = Path(__file__).parent / "data"
SCALE = ".int8_scale"  # see pack
SHA256 = {
    # Mean of 65,536 W codes of seed 0: ``python -m pipelines.training.mean_code`` makes it again.
    "mobilestylegan_mean.safetensors": "e4583dbad36362b9f9ce5a1089d6ac41ad95106a63dc02a25ebcf120ba5c6a22",
    "swapper.safetensors": "2b30a2d4bee68668b252217a5168b081729553bb458613ff072ca095a7a2632b",
    "encoder.safetensors": "065b05781009f7e94f5c35c2eefc364aec976e5613d489f4844f67085dff2292",
    "mobilestylegan_head256.safetensors": "746ad758517a624a2c4e36757b201974e101e30e1e8d1efd48b304c265d9573e",
    "random_face/MappingNetwork.xml": "73e2096cad6e696e4af47df2477e048ab4c42c0e0dec83c7c66604822689e55b",
    "random_face/MappingNetwork.bin": "212dd716bdb556e18db603ea97300d4fa3c872b878c726b2402fea80820e7305",
    "random_face/SynthesisNetwork.xml": "7918fce515243954d3e06628cb39a23902d6b1d5d02932cc0c2faee7a2aeeedd",
    "random_face/SynthesisNetwork.bin": "c7da15fa22d508c82e1c30dd6b4cdf67fe3ccdddaf85b310ee764dbf0c289645",
    "mobilefacenet.safetensors": "01a96551f9de56c22813a3a1069a76a9a876f1d3f40581718c92b2f190f6a319",
    "dlib_resnet.safetensors": "11573dbefef79f678b0861cba90cae135eb4afb6d40f914351cda9b28217dade",
    "faceres.safetensors": "05c547d4aa7befa868d4748bf918bcacb9aa7cc044732142e521bca980e88ec0",
}


class WeightsError(RuntimeError):
    """A weights file is missing, or is not the file that this version was tested with."""


def read_verified(name: str) -> bytes:
    """The content of an embedded weights file, after checking its sha256.

    Args:
        name: a key of ``SHA256``: ``random_face/FILE`` (from that package) or a file in ``data/``.

    Raises:
        WeightsError: unknown name, missing file or package, or a digest that differs.
    """
    if name not in SHA256:
        raise WeightsError(f"unknown weights file {name!r}")
    if name.startswith("random_face/"):
        # Found without importing: the package's own imports need packages that we do not.
        spec = importlib.util.find_spec("random_face")
        if spec is None or spec.origin is None:
            raise WeightsError(
                "the package random-face is not installed (pip install --no-deps random-face==2021.7.21.1)"
            )
        path = Path(spec.origin).parent / "data" / name.split("/", 1)[1]
    else:
        path = DATA / name
    return read_checked(path, SHA256[name])


def read_checked(path: Path, sha256: str) -> bytes:
    """A file's content, after checking its sha256.

    Raises:
        WeightsError: the file cannot be read, or has another digest.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot read weights {path}: {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise WeightsError(f"{path} has sha256 {digest}, expected {sha256}: refused")
    return content


def read_safetensors(name: str) -> dict[str, Tensor]:
    """``read_verified`` and parse as safetensors; float16 entries and ``pack``'s int8 ones come back as float32."""
    stored = load_safetensors(read_verified(name))
    found = {}
    for key, value in stored.items():
        if value.dtype == torch.int8:
            scale = stored[key + SCALE]
            found[key] = value.float() * scale.view(-1, *[1] * (value.ndim - 1))
        elif not key.endswith(SCALE):
            found[key] = value.float() if value.is_floating_point() else value
    return found


def pack(state: dict[str, Tensor], above: int = 100_000) -> dict[str, Tensor]:
    """Weights for storage: matrices and kernels of more than ``above`` numbers as int8, the rest as float16.

    Each output channel of an int8 entry has its own scale (float32, under the entry's name and ``SCALE``): its largest
    magnitude is 127, so that rounding costs about 1/250 of it at most.
    """
    packed = {}
    for key, value in state.items():
        if value.is_floating_point() and value.ndim > 1 and value.numel() > above:
            rows = value.float().flatten(1)
            scale = rows.abs().amax(1).clamp_min(1e-12) / 127
            packed[key] = (rows / scale[:, None]).round().to(torch.int8).view(value.shape)
            packed[key + SCALE] = scale
        else:
            packed[key] = value.half() if value.is_floating_point() else value
    return packed
