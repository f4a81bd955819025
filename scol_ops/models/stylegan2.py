"""StyleGAN2's generator (Karras et al. 2020, arXiv:1912.04958), 8 to 1024 px, for both public layouts.

The network carries the names of rosinality's port (github.com/rosinality/stylegan2-pytorch, model.py), so its own
entries are that layout; ``NVIDIA`` (github.com/NVlabs/stylegan2-ada-pytorch, training/networks.py) is a renaming of
them (``from_nvidia``, ``to_nvidia``).  The two differ in three small things besides names, which ``layout`` selects:
where the equalised learning rate's factor stands relative to the demodulation's epsilon, a clamp at +-256, and the
gain inside the stored blur kernel.

Modulation scales the activations instead of the weights, and demodulation the result: the same product as the
reference's grouped convolution up to rounding, one shared kernel for the whole batch, and so free to use
channels-last, autocast and compiled kernels.  Style codes (B, L, 512), L = 2 log2(size) - 2; pictures (B, 3, S, S).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CODE_DIM = 512
ROSINALITY, NVIDIA = "rosinality", "nvidia"
LAYOUTS = (ROSINALITY, NVIDIA)
_EPSILON = 1e-8
_NVIDIA_CLAMP = 256.0


def num_codes(size: int) -> int:
    """L of a generator of this size: 10 at 64 px, 14 at 256, 18 at 1024.

    Raises:
        ValueError: not a power of two in 4..1024.
    """
    if size not in (4, 8, 16, 32, 64, 128, 256, 512, 1024):
        raise ValueError(f"StyleGAN2's size is a power of two from 4 to 1024 px, got {size}")
    return 2 * int(math.log2(size)) - 2


def channels(resolution: int, multiplier: int) -> int:
    """Width at a resolution: 512 up to 64 px for the usual multiplier 2, halved with every octave above."""
    return min(512, 16384 * multiplier // resolution)


class PixelNorm(nn.Module):
    """Each vector (B, D) to unit mean square."""

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + _EPSILON)


class EqualLinear(nn.Module):
    """A linear layer with equalised learning rate: stored weights are 1 / (lr_mul / sqrt(in)) times those in effect."""

    def __init__(self, cin: int, cout: int, lr_mul: float = 1.0, bias: float = 0.0, activate: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin) / lr_mul)
        self.bias = nn.Parameter(torch.full((cout,), bias / lr_mul))
        self.scale, self.lr_mul, self.activate = lr_mul / math.sqrt(cin), lr_mul, activate

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight * self.scale, self.bias * self.lr_mul)
        return F.leaky_relu(x, 0.2) * math.sqrt(2.0) if self.activate else x


def blur_kernel() -> Tensor:
    """The 4 x 4 binomial kernel for upsampling by 2: outer product of [1, 3, 3, 1], sum 4."""
    line = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(line, line) / 16


class Resampler(nn.Module):
    """Holds the kernel as the public files do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", blur_kernel())

    def blur(self, x: Tensor) -> Tensor:
        """Odd pictures of a transposed convolution, (B, C, 2H + 1, 2W + 1), to (B, C, 2H, 2W)."""
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, kernel, padding=1, groups=x.shape[1])

    def double(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W): zeros between the pixels, then the kernel."""
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


class ModulatedConv(nn.Module):
    """A convolution whose input channels a code scales; demodulated, its outputs keep unit variance.

    Args:
        kernel: 3 or 1.
        demodulate: see arXiv:1912.04958, section 2.2.
        up: double the size by a transposed convolution and the blur.
        scaled: multiply the weights by 1 / sqrt(fan in); without it the demodulation alone takes their scale out.
    """

    def __init__(self, cin: int, cout: int, kernel: int, demodulate: bool, up: bool, scaled: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, cout, cin, kernel, kernel))
        self.modulation = EqualLinear(CODE_DIM, cin, bias=1.0)
        self.blur = Resampler() if up else None
        self.scale = 1 / math.sqrt(cin * kernel * kernel) if scaled else 1.0
        self.demodulate, self.padding = demodulate, kernel // 2

    def forward(self, x: Tensor, code: Tensor, gain: float = 1.0) -> Tensor:
        """x (B, Cin, H, W), code (B, 512) -> (B, Cout, H, W), or twice the size; times ``gain``."""
        weight = self.weight[0] * self.scale
        with torch.autocast(x.device.type, enabled=False):  # small, and a style in bfloat16 would shift colours
            style = self.modulation(code.float())
            after = None
            if self.demodulate:
                power = style.square() @ weight.float().square().sum(dim=(2, 3)).T
                after = torch.rsqrt(power + _EPSILON) * gain
        x = x * style[:, :, None, None].to(x.dtype)
        if self.blur is not None:
            x = self.blur.blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2))
        else:
            x = F.conv2d(x, weight, padding=self.padding)
        return x if after is None else x * after[:, :, None, None].to(x.dtype)


class Bias(nn.Module):
    """A bias that the public layout keeps with the activation."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(count))


class NoiseWeight(nn.Module):
    """The strength of a layer's noise map."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class StyledConv(nn.Module):
    """Modulated convolution, noise, bias, leaky ReLU of slope 0.2 with gain sqrt(2)."""

    def __init__(self, cin: int, cout: int, up: bool, layout: str) -> None:
        super().__init__()
        self.conv = ModulatedConv(cin, cout, 3, True, up, layout == ROSINALITY)
        self.noise = NoiseWeight()
        self.activate = Bias(cout)
        self.clamp = _NVIDIA_CLAMP if layout == NVIDIA else None

    def forward(self, x: Tensor, code: Tensor, noise: Tensor) -> Tensor:
        # The gain goes into every summand, since leaky ReLU is positively homogeneous: one pass less over the map.
        gain = math.sqrt(2.0)
        x = self.conv(x, code, gain)
        x = (
            x
            + (noise * (self.noise.weight * gain)).to(x.dtype)
            + (self.activate.bias * gain).view(-1, 1, 1).to(x.dtype)
        )
        x = F.leaky_relu(x, 0.2)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class ToRGB(nn.Module):
    """1 x 1 modulated convolution to RGB, without demodulation or activation, added to the doubled picture before."""

    def __init__(self, cin: int, up: bool, layout: str) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.conv = ModulatedConv(cin, 3, 1, False, False, True)
        self.upsample = Resampler() if up else None
        self.clamp = _NVIDIA_CLAMP if layout == NVIDIA else None

    def forward(self, x: Tensor, code: Tensor, picture: Tensor | None) -> Tensor:
        x = self.conv(x, code) + self.bias.to(x.dtype)
        if self.clamp is not None:
            x = x.clamp(-self.clamp, self.clamp)
        x = x.float()  # the sum over octaves: in bfloat16 it would band
        return x if picture is None or self.upsample is None else x + self.upsample.double(picture)


class ConstantInput(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, width, 4, 4))


class StyleGAN2(nn.Module):
    """Style codes to pictures.

    Args:
        size: of the picture in pixels, a power of two from 4 to 1024.
        multiplier: of the width above 32 px: 2 as published for faces, 1 for NVIDIA's ``paper256``.
        mapping_layers: 8; NVIDIA's ``auto`` files have 2.
        layout: of the file that the weights come from, see the module.

    Attributes:
        num_codes: L.
        resolution: ``size``.
        memory_format: of the feature maps; ``runtime.channels_last`` sets it.
        mean_code: (512,), the mean of W (``latent_avg``, ``w_avg``); a buffer, and no entry of rosinality's ``g_ema``.
    """

    def __init__(self, size: int, multiplier: int = 2, mapping_layers: int = 8, layout: str = ROSINALITY) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
        if mapping_layers < 1 or multiplier not in (1, 2):
            raise ValueError(f"no StyleGAN2 has {mapping_layers} mapping layers and multiplier {multiplier}")
        self.num_codes, self.resolution = num_codes(size), size
        self.multiplier, self.mapping_layers, self.layout = multiplier, mapping_layers, layout
        self.memory_format = torch.contiguous_format
        self.style = nn.Sequential(
            PixelNorm(), *(EqualLinear(CODE_DIM, CODE_DIM, 0.01, activate=True) for _ in range(mapping_layers))
        )
        width = channels(4, multiplier)
        self.input = ConstantInput(width)
        self.conv1 = StyledConv(width, width, False, layout)
        self.to_rgb1 = ToRGB(width, False, layout)
        self.convs, self.to_rgbs, self.noises = nn.ModuleList(), nn.ModuleList(), nn.Module()
        self.noises.register_buffer("noise_0", torch.randn(1, 1, 4, 4))
        for i in range(int(math.log2(size)) - 2):
            resolution, out = 8 << i, channels(8 << i, multiplier)
            self.convs.append(StyledConv(width, out, True, layout))
            self.convs.append(StyledConv(out, out, False, layout))
            self.to_rgbs.append(ToRGB(out, True, layout))
            for k in (2 * i + 1, 2 * i + 2):
                self.noises.register_buffer(f"noise_{k}", torch.randn(1, 1, resolution, resolution))
            width = out
        self.register_buffer("mean_code", torch.zeros(CODE_DIM))

    @property
    def mapping(self) -> nn.Module:
        """z (B, 512) to w (B, 512), not truncated."""
        return self.style

    def truncate(self, w: Tensor, psi: float) -> Tensor:
        """Truncation trick: ``mean_code + psi (w - mean_code)``, (B, 512)."""
        return self.mean_code + psi * (w - self.mean_code)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (B, L, 512) to pictures (B, 3, S, S), RGB, nominally in [-1, 1] (not clamped), with the stored noise.

        Raises:
            ValueError: another shape.
        """
        if codes.ndim != 3 or codes.shape[1:] != (self.num_codes, CODE_DIM):
            raise ValueError(f"codes must be (B, {self.num_codes}, {CODE_DIM}), got {tuple(codes.shape)}")
        noise = [getattr(self.noises, f"noise_{k}") for k in range(self.num_codes - 1)]
        x = self.input.input.expand(len(codes), -1, -1, -1).contiguous(memory_format=self.memory_format)
        x = self.conv1(x, codes[:, 0], noise[0])
        picture = self.to_rgb1(x, codes[:, 1], None)
        for i, to_rgb in enumerate(self.to_rgbs):
            k = 2 * i + 1
            x = self.convs[k - 1](x, codes[:, k], noise[k])
            x = self.convs[k](x, codes[:, k + 1], noise[k + 1])
            picture = to_rgb(x, codes[:, k + 2], picture)
        return picture

    def tunable(self, which: str) -> Iterator[str]:
        """Names of the parameters that a set of ``tuning.PARAMETER_SETS`` moves; the mapping network never moves.

        ``convolutions`` leaves the modulation layers; ``late`` keeps the blocks below 64 px.
        """
        for name, _ in self.named_parameters():
            if name.startswith("style."):
                continue
            if which == "convolutions" and ".modulation." in name:
                continue
            if which == "late" and _resolution(name) < 64:
                continue
            yield name


def _resolution(name: str) -> int:
    """Resolution in px at which a parameter works, from its name."""
    group, _, rest = name.partition(".")
    if group == "convs":
        return 8 << int(rest.split(".")[0]) // 2
    return 8 << int(rest.split(".")[0]) if group == "to_rgbs" else 4


# ---- NVIDIA's names --------------------------------------------------------------------------------------------------


def nvidia_names(size: int, mapping_layers: int = 8) -> dict[str, str]:
    """NVIDIA's name of every entry (but the filters) -> ours."""
    names = {"mapping.w_avg": "mean_code", "synthesis.b4.const": "input.input"}
    for i in range(mapping_layers):
        for part in ("weight", "bias"):
            names[f"mapping.fc{i}.{part}"] = f"style.{i + 1}.{part}"

    def layer(theirs: str, ours: str, noise: int | None) -> None:
        names[f"{theirs}.weight"] = f"{ours}.conv.weight"
        names[f"{theirs}.affine.weight"] = f"{ours}.conv.modulation.weight"
        names[f"{theirs}.affine.bias"] = f"{ours}.conv.modulation.bias"
        names[f"{theirs}.bias"] = f"{ours}.bias" if noise is None else f"{ours}.activate.bias"
        if noise is not None:
            names[f"{theirs}.noise_strength"] = f"{ours}.noise.weight"
            names[f"{theirs}.noise_const"] = f"noises.noise_{noise}"

    layer("synthesis.b4.conv1", "conv1", 0)
    layer("synthesis.b4.torgb", "to_rgb1", None)
    for i in range(int(math.log2(size)) - 2):
        block = f"synthesis.b{8 << i}"
        layer(f"{block}.conv0", f"convs.{2 * i}", 2 * i + 1)
        layer(f"{block}.conv1", f"convs.{2 * i + 1}", 2 * i + 2)
        layer(f"{block}.torgb", f"to_rgbs.{i}", None)
    return names


def nvidia_filters(size: int) -> dict[str, str | None]:
    """NVIDIA's name of every stored filter -> our kernel, which is four times it; None where we keep none.

    Every block and every layer has one there, used or not.
    """
    names: dict[str, str | None] = {"synthesis.b4.resample_filter": None, "synthesis.b4.conv1.resample_filter": None}
    for i in range(int(math.log2(size)) - 2):
        block = f"synthesis.b{8 << i}"
        names[f"{block}.resample_filter"] = f"to_rgbs.{i}.upsample.kernel"
        names[f"{block}.conv0.resample_filter"] = f"convs.{2 * i}.conv.blur.kernel"
        names[f"{block}.conv1.resample_filter"] = None
    return names


def nvidia_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape in NVIDIA's files of our entry of this name and shape."""
    shape = tuple(shape)
    if name.endswith(".conv.weight") or name == "input.input":
        return shape[1:]
    if name.endswith(".noise.weight"):
        return ()
    if name.startswith("noises."):
        return shape[2:]
    return shape[1:2] if len(shape) == 4 else shape  # of four dimensions is then only the bias of an RGB layer


def from_nvidia(state: dict[str, Tensor], size: int, mapping_layers: int = 8) -> dict[str, Tensor]:
    """NVIDIA's entries (all of them) to ours."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in StyleGAN2(size, _multiplier(state), mapping_layers).state_dict().items()}
    names = nvidia_names(size, mapping_layers)
    ours = {name: state[theirs].reshape(shapes[name]) for theirs, name in names.items()}
    # Four times a quarter: exact.
    return ours | {name: state[theirs] * 4 for theirs, name in nvidia_filters(size).items() if name is not None}


def to_nvidia(state: dict[str, Tensor], size: int, mapping_layers: int = 8) -> dict[str, Tensor]:
    """The reverse of ``from_nvidia``, bit for bit."""
    names = nvidia_names(size, mapping_layers)
    theirs = {their: state[name].reshape(nvidia_shape(name, state[name].shape)) for their, name in names.items()}
    for their, name in nvidia_filters(size).items():
        theirs[their] = blur_kernel() / 4 if name is None else state[name] / 4
    return theirs


def _multiplier(state: dict[str, Tensor]) -> int:
    weight = state.get("synthesis.b64.conv1.weight")
    return 1 if weight is not None and weight.shape[0] == channels(64, 1) else 2
