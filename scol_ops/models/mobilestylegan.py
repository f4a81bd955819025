"""MobileStyleGAN (FFHQ, 1024 px) as a differentiable, trainable PyTorch module.

Architecture: Belousov, "MobileStyleGAN: A Lightweight Convolutional Neural Network for
High-Fidelity Image Synthesis", arXiv:2104.04767.  The layout here was read off the exported
graph in the PyPI package ``random-face``: demodulation is already folded into the convolution
weights, and the noise maps are constants.

A style code has shape (L, 512) with L = 16, in StyleGAN2's order: code 0 drives the first
convolution, codes 2i+1 drive the up-sampling and the first layer of block i, codes 2i+2 its
second layer, and the last code the conversion to an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_CODES = 16
CODE_DIM = 512
FULL_RESOLUTION = 1024
HEAD_BLOCKS = 5  # the 256 px generator keeps blocks 0..4, whose output is 256 x 128 x 128

# Channels of each block: (input, output of its first layer); the second layer keeps the width.
BLOCKS = ((512, 512), (512, 512), (512, 512), (512, 512), (512, 256), (256, 128), (128, 64))


class PixelNorm(nn.Module):
    """Scale each vector to unit mean square; epsilon 1e-8 as exported."""

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)


class MappingNetwork(nn.Module):
    """z ~ N(0, I) of shape (B, 512) to w of shape (B, 512): StyleGAN2-FFHQ's W space."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = PixelNorm()
        self.layers = nn.ModuleList(nn.Linear(CODE_DIM, CODE_DIM) for _ in range(8))

    def forward(self, z: Tensor) -> Tensor:
        if z.ndim != 2 or z.shape[1] != CODE_DIM:
            raise ValueError(f"z must be (B, {CODE_DIM}), got {tuple(z.shape)}")
        x = self.norm(z)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2) * math.sqrt(2.0)
        return x


def inverse_haar(x: Tensor) -> Tensor:
    """Inverse 2-D Haar transform.

    Args:
        x: (B, 4C, H, W): C low bands first, then for each channel its three details in the
            order vertical, horizontal, diagonal.

    Returns:
        (B, C, 2H, 2W).
    """
    batch, channels, height, width = x.shape
    c = channels // 4
    low = x[:, :c]
    vertical, horizontal, diagonal = x[:, c:].reshape(batch, c, 3, height, width).unbind(2)
    a, b = low + vertical, low - vertical
    d, e = horizontal + diagonal, horizontal - diagonal
    quads = torch.stack((a + d, a - d, b + e, b - e), dim=2) * 0.5
    return F.pixel_shuffle(quads.reshape(batch, 4 * c, height, width), 2)


class Affine(nn.Linear):
    """A style layer: one code (B, 512) to one factor a channel (B, C, 1, 1)."""

    def __init__(self, channels: int, gain: float = 1.0) -> None:
        super().__init__(CODE_DIM, channels)
        self.gain = gain

    def forward(self, code: Tensor) -> Tensor:
        return (super().forward(code) * self.gain)[:, :, None, None]


class StyledLayer(nn.Module):
    """Modulate, convolve (dense 3x3, or depthwise 3x3 and pointwise 1x1), add noise and bias, leaky ReLU."""

    def __init__(self, cin: int, cout: int, resolution: int, depthwise: bool = True, gain: float | None = None) -> None:
        super().__init__()
        self.style = Affine(cin, 1.0 / math.sqrt(9 * cin) if gain is None else gain)
        self.depthwise = nn.Conv2d(cin, cin, 3, padding=1, groups=cin, bias=False) if depthwise else None
        self.conv = nn.Conv2d(cin, cout, 1 if depthwise else 3, padding=0 if depthwise else 1)
        self.register_buffer("noise", torch.zeros(1, 1, resolution, resolution))

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        x = x * self.style(code)
        if self.depthwise is not None:
            x = self.depthwise(x)
        return F.leaky_relu(self.conv(x) + self.noise, 0.2)


class Block(nn.Module):
    """Modulated inverse Haar transform (channels / 4, size x 2), then two styled layers."""

    def __init__(self, cin: int, cout: int, resolution: int) -> None:
        super().__init__()
        self.up = Affine(cin)
        self.conv1 = StyledLayer(cin // 4, cout, resolution)
        self.conv2 = StyledLayer(cout, cout, resolution)

    def forward(self, x: Tensor, code1: Tensor, code2: Tensor) -> Tensor:
        x = inverse_haar(x * self.up(code1))
        return self.conv2(self.conv1(x, code1), code2)


class ToImage(nn.Module):
    """Modulated 1x1 convolution to 12 channels and the inverse Haar transform to RGB."""

    def __init__(self, cin: int, gain: float | None = None) -> None:
        super().__init__()
        self.style = Affine(cin, 1.0 / math.sqrt(cin) if gain is None else gain)
        self.conv = nn.Conv2d(cin, 12, 1)

    def bands(self, x: Tensor, code: Tensor) -> Tensor:
        return self.conv(x * self.style(code))

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        return inverse_haar(self.bands(x, code))


class Head256(nn.Module):
    """Features of block 4 and the last five codes to a 256 px image (trained by ``pipelines/training/train_head.py``).

    Stands for blocks 5, 6 and the image layer, which the export has only at 1024 px; it works at
    128 x 128 throughout and reaches 256 by one inverse Haar transform.  A modulated linear map from
    the features to the transform's bands is a close first guess; four styled layers correct it.
    """

    WIDTH = 128

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            StyledLayer(256 if i == 0 else self.WIDTH, self.WIDTH, 1, gain=1.0) for i in range(4)
        )
        self.skip = ToImage(256, gain=1.0)
        self.to_img = ToImage(self.WIDTH, gain=1.0)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """x (B, 256, 128, 128), codes (B, 5, 512): codes 11..15 of the whole -> (B, 3, 256, 256)."""
        first = self.skip.bands(x, codes[:, 0])
        for i, layer in enumerate(self.layers):
            x = layer(x, codes[:, i])
        return inverse_haar(first + self.to_img.bands(x, codes[:, 4]))


class MobileStyleGAN(nn.Module):
    """Style codes to faces.

    Args:
        resolution: 256 (blocks 0..4 and the distilled head) or 1024 (all of it).
    """

    num_codes = NUM_CODES

    def __init__(self, resolution: int = 256) -> None:
        super().__init__()
        if resolution not in (256, FULL_RESOLUTION):
            raise ValueError(f"resolution must be 256 or {FULL_RESOLUTION}, got {resolution}")
        self.resolution = resolution
        self.mapping = MappingNetwork()
        self.const = nn.Parameter(torch.zeros(1, 512, 4, 4))
        self.conv1 = StyledLayer(512, 512, 4, depthwise=False)
        count = HEAD_BLOCKS if resolution == 256 else len(BLOCKS)
        self.blocks = nn.ModuleList(Block(cin, cout, 8 << i) for i, (cin, cout) in enumerate(BLOCKS[:count]))
        self.head = Head256() if resolution == 256 else ToImage(BLOCKS[-1][1])
        self.register_buffer("mean_code", torch.zeros(CODE_DIM))

    def features(self, codes: Tensor) -> Tensor:
        """Codes (B, 16, 512) to the last block's output: (B, 256, 128, 128), or (B, 64, 512, 512) at 1024 px."""
        if codes.ndim != 3 or codes.shape[1:] != (NUM_CODES, CODE_DIM):
            raise ValueError(f"codes must be (B, {NUM_CODES}, {CODE_DIM}), got {tuple(codes.shape)}")
        x = self.conv1(self.const.expand(codes.shape[0], -1, -1, -1), codes[:, 0])
        for i, block in enumerate(self.blocks):
            x = block(x, codes[:, 2 * i + 1], codes[:, 2 * i + 2])
        return x

    def tunable(self, which: str) -> Iterator[str]:
        """Names of the parameters that a set of ``tuning.PARAMETER_SETS`` moves; the mapping network never moves."""
        for name, _ in self.named_parameters():
            if name.startswith("mapping."):
                continue
            if which == "convolutions" and (".style." in name or ".up." in name):
                continue
            if which == "late" and not name.startswith(("blocks.3.", "blocks.4.", "blocks.5.", "blocks.6.", "head.")):
                continue
            yield name

    def truncate(self, w: Tensor, psi: float) -> Tensor:
        """Truncation trick: ``mean_code + psi (w - mean_code)``, (B, 512)."""
        return self.mean_code + psi * (w - self.mean_code)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (B, 16, 512) to pictures (B, 3, R, R), RGB, nominally in [-1, 1] (not clamped)."""
        x = self.features(codes)
        if self.resolution == 256:
            return self.head(x, codes[:, 2 * HEAD_BLOCKS + 1 :])
        return self.head(x, codes[:, NUM_CODES - 1])


def state_dict_from_ir(
    mapping: Sequence[tuple[str, np.ndarray, tuple[str, ...]]],
    synthesis: Sequence[tuple[str, np.ndarray, tuple[str, ...]]],
) -> dict[str, Tensor]:
    """Rename the constants of the two exported graphs to the entries of ``MobileStyleGAN(1024)``.

    Named constants keep PyTorch names; the folded weights (``Mul_*_copy``) and the noise maps are
    anonymous and come in the order of the layers, so they are assigned by that order and checked
    by shape when the dictionary is loaded (strictly).

    Raises:
        KeyError, ValueError: the graphs are not this export.
    """
    state: dict[str, Tensor] = {}

    def put(name: str, array: np.ndarray) -> None:
        state[name] = torch.from_numpy(np.array(array, dtype=np.float32))

    linear = [a for _, a, _ in mapping if a.dtype == np.float32 and a.size >= CODE_DIM]
    if len(linear) != 16:
        raise ValueError(f"the mapping graph has {len(linear)} large constants instead of 16")
    for i in range(8):
        put(f"mapping.layers.{i}.weight", linear[2 * i])
        put(f"mapping.layers.{i}.bias", linear[2 * i + 1].reshape(-1))

    named = {name: array for name, array, _ in synthesis if name.startswith("m.")}
    folded = [a for name, a, _ in synthesis if name.startswith("Mul_") and name.endswith("_copy")]
    noise = [a for name, a, to in synthesis if a.ndim == 4 and a.shape[:2] == (1, 1) and a.size > 1]
    layers = ["conv1"] + [f"blocks.{i}.conv{j}" for i in range(len(BLOCKS)) for j in (1, 2)]
    if len(folded) != len(layers) or len(noise) != len(layers):
        raise ValueError(f"the synthesis graph has {len(folded)} folded weights and {len(noise)} noise maps")
    put("const", named["m.input.input"])
    for layer, weight, noise_map in zip(layers, folded, noise, strict=True):
        source = "m." + layer.replace("blocks", "layers")
        put(f"{layer}.style.weight", named[f"{source}.conv.modulation.weight"])
        put(f"{layer}.style.bias", named[f"{source}.conv.modulation.bias"].reshape(-1))
        put(f"{layer}.conv.weight", weight)
        put(f"{layer}.conv.bias", named[f"{source}.bias"].reshape(-1))
        put(f"{layer}.noise", noise_map)
        if layer != "conv1":
            put(f"{layer}.depthwise.weight", named[f"{source}.conv.weight_dw"].reshape(-1, 1, 3, 3))
    for i in range(len(BLOCKS)):
        put(f"blocks.{i}.up.weight", named[f"m.layers.{i}.up.modulation.weight"])
        put(f"blocks.{i}.up.bias", named[f"m.layers.{i}.up.modulation.bias"].reshape(-1))
    last = f"m.layers.{len(BLOCKS) - 1}.to_img"
    put("head.style.weight", named[f"{last}.conv.modulation.weight"])
    put("head.style.bias", named[f"{last}.conv.modulation.bias"].reshape(-1))
    put("head.conv.weight", named[f"{last}.conv.weight"])
    put("head.conv.bias", named[f"{last}.bias"].reshape(-1))
    return state
