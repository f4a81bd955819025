"""How visible a change is: a measure of the kind of ColorVideoVDP that can be minimised, at a tenth of its cost.

Mantiuk et al. 2024, "ColorVideoVDP: A visual difference predictor for image, video and display distortions" (ACM TOG
43(4), sections 3.2 to 3.7): light of a display, opponent colours, a pyramid of contrasts, each against the eye's
sensitivity, masked by what is there already, pooled to JOD.  Here everything that depends on the original alone is
computed once: contrasts are against its light, and it alone masks (there: the smaller of both).  So its texture
forgives change, and the change does not hide itself. Constants are those of the package ``cvvdp`` 0.5.7 (base model,
still pictures, display ``standard_fhd``).

``visibility.jod`` is the package itself and reports; this steers (docs/results.md tells how well they agree).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PIXELS_PER_DEGREE = 37.84  # of ``standard_fhd``: 24 inches of 1920 x 1080 at 0.6 m
_PEAK, _BLACK, _REFLECTED = 200.0, 0.2, 0.398  # cd/m^2: white, black, and what the screen reflects of 250 lux
# Linear sRGB to DKL with D65: achromatic, red-green, violet-yellow (XYZ -> LMS 2006 -> DKL).
_DKL = ((0.233201, 0.728831, 0.088996), (0.127621, -0.087068, -0.036777), (-0.214823, -0.626254, 0.851403))
# log10 of the sensitivity (castleCSF, Gaussian of 1.5 degrees) by background light and frequency, of each opponent
# colour.
_FREQUENCIES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # cycles a degree
_LIGHTS = (0.6, 2.0, 6.0, 20.0, 60.0, 200.0)  # cd/m^2
_SENSITIVITY = (
    (
        (0.881, 1.278, 1.620, 1.853, 1.878, 1.657, 1.161, 0.412, -0.543, -1.685),
        (0.965, 1.363, 1.678, 1.985, 2.088, 1.945, 1.527, 0.856, -0.021, -1.085),
        (1.039, 1.437, 1.735, 2.074, 2.243, 2.167, 1.816, 1.211, 0.401, -0.596),
        (1.111, 1.508, 1.807, 2.137, 2.367, 2.353, 2.063, 1.520, 0.771, -0.165),
        (1.161, 1.558, 1.856, 2.171, 2.439, 2.463, 2.211, 1.705, 0.995, 0.097),
        (1.191, 1.588, 1.887, 2.189, 2.478, 2.522, 2.291, 1.806, 1.116, 0.238),
    ),
    (
        (1.470, 1.628, 1.712, 1.739, 1.662, 1.474, 1.214, 0.917, 0.596, 0.253),
        (1.716, 1.874, 1.958, 1.985, 1.908, 1.720, 1.461, 1.164, 0.842, 0.499),
        (1.928, 2.086, 2.170, 2.197, 2.120, 1.931, 1.672, 1.375, 1.054, 0.710),
        (2.122, 2.280, 2.364, 2.391, 2.314, 2.125, 1.866, 1.569, 1.248, 0.904),
        (2.242, 2.400, 2.484, 2.511, 2.434, 2.246, 1.987, 1.690, 1.368, 1.025),
        (2.307, 2.465, 2.549, 2.576, 2.499, 2.311, 2.052, 1.755, 1.433, 1.090),
    ),
    (
        (0.869, 1.059, 1.157, 1.180, 1.086, 0.888, 0.628, 0.333, 0.011, -0.335),
        (1.069, 1.259, 1.357, 1.381, 1.287, 1.088, 0.829, 0.534, 0.212, -0.134),
        (1.246, 1.436, 1.534, 1.558, 1.464, 1.265, 1.006, 0.711, 0.389, 0.043),
        (1.421, 1.611, 1.709, 1.733, 1.639, 1.440, 1.181, 0.886, 0.564, 0.218),
        (1.546, 1.736, 1.834, 1.858, 1.763, 1.565, 1.306, 1.010, 0.689, 0.343),
        (1.626, 1.816, 1.914, 1.938, 1.844, 1.645, 1.386, 1.091, 0.769, 0.423),
    ),
)
_CORRECTION = -0.2797423 / 20  # log10, added to the sensitivity
_GAIN = (1.0, 1.45, 1.0)  # of the opponent colours
_POWER, _LARGEST = 2.2643552, 10**2.5642455  # of a contrast, and where it saturates
_MASKING = (1.3026227, 2.8885908, 3.6807714)  # powers of the masking contrast
_MASKED = 10**-0.7954971
# log2 of how much each colour (row) masks each other (column).
_CROSS = ((-0.1895010, -5.9621511, -4.3183460), (2.5655594, 0.3440671, -2.7196465), (3.8118372, -1.0051706, -0.5193377))
_BASE = (0.0036334486, 1.6627724, 4.1187453)  # weights of the mean's own change
_STILL, _JOD, _JOD_POWER = 0.5779183, 0.0439569, 0.9302043
_BLUR = 3.0  # sigma of the masking neighbourhood, pixels of each band
_REDUCE = (0.05, 0.25, 0.4, 0.25, 0.05)
_FIRST_OCTAVE = 0.3228  # centre of the second band, as a share of the highest frequency; the first's is that itself
_LOWEST = 0.2  # cycles a degree: what is lower counts as the mean


def opponent_light(pictures: Tensor) -> Tensor:
    """Light of a display: sRGB (B, 3, H, W) in [-1, 1], clamped, to DKL in cd/m^2; linear in light."""
    value = (pictures.clamp(-1, 1) + 1) / 2
    light = torch.where(value > 0.04045, ((value.clamp_min(0.04) + 0.055) / 1.055) ** 2.4, value / 12.92)
    light = (_PEAK - _BLACK) * light + _BLACK + _REFLECTED
    return torch.einsum("ij,bjhw->bihw", light.new_tensor(_DKL), light)


def _filtered(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """A symmetric kernel along both axes; the picture is mirrored beyond its edge."""
    channels, radius = x.shape[1], len(kernel) // 2
    # Mirroring needs a picture larger than the radius.
    mode = "reflect" if min(x.shape[-2:]) > radius else "replicate"
    x = F.pad(x, (radius,) * 4, mode=mode)
    kernel = kernel.to(x).expand(channels, 1, -1)
    x = F.conv2d(x, kernel[:, :, :, None], stride=(stride, 1), groups=channels)
    return F.conv2d(x, kernel[:, :, None, :], stride=(1, stride), groups=channels)


def _reduced(x: Tensor) -> Tensor:
    return _filtered(x, torch.tensor(_REDUCE), 2)


def _enlarged(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _sensitivity(frequency: float, light: Tensor) -> Tensor:
    """(B, 1, H, W) light in cd/m^2 -> (B, 3, H, W) sensitivities, interpolated in logarithms."""
    table = light.new_tensor(_SENSITIVITY)
    at = torch.tensor(_FREQUENCIES).log10()
    x = min(max(math.log10(frequency), float(at[0])), float(at[-1]))
    i = min(int((at <= x).sum()) - 1, len(at) - 2)
    share = (x - float(at[i])) / float(at[i + 1] - at[i])
    column = table[:, :, i] * (1 - share) + table[:, :, i + 1] * share  # (3, lights)
    lights = light.new_tensor(_LIGHTS).log10()
    y = light.log10().clamp(float(lights[0]), float(lights[-1]))[:, 0]
    j = (torch.bucketize(y.contiguous(), lights) - 1).clamp(0, len(lights) - 2)
    part = (y - lights[j]) / (lights[j + 1] - lights[j])
    found = column[:, j] * (1 - part) + column[:, j + 1] * part  # (3, B, H, W)
    return 10 ** (found.transpose(0, 1) + _CORRECTION)


class VisibleDifference:
    """What an eye sees of a change of one original.

    Args:
        original: (B, 3, H, W), RGB in [-1, 1]; at least 8 x 8.
        pixels_per_degree: of the visual field; lower: the picture is looked at from nearer.
        weight: (B, 1, H, W) or (1, 1, H, W), >= 0: how much each place counts; None: all alike.

    Raises:
        ValueError: wrong shape or size, a resolution that is not positive, weights that are all zero.
    """

    def __init__(self, original: Tensor, pixels_per_degree: float = PIXELS_PER_DEGREE, weight: Tensor | None = None):
        if original.ndim != 4 or original.shape[1] != 3 or min(original.shape[-2:]) < 8:
            raise ValueError(f"pictures must be (B, 3, H, W), 8 x 8 at least, got {tuple(original.shape)}")
        if not pixels_per_degree > 0:
            raise ValueError(f"pixels a degree must be positive, got {pixels_per_degree}")
        weight = torch.ones_like(original[:1, :1]) if weight is None else weight.to(original)
        if not float(weight.sum()) > 0:
            raise ValueError("weights are all zero: nothing is looked at")
        highest = pixels_per_degree / 2
        octaves = math.ceil(math.log2(max(highest * _FIRST_OCTAVE / _LOWEST, 1))) + 1
        levels = max(1, min(octaves, int(math.log2(min(original.shape[-2:]))) - 2))
        frequencies = [highest] + [highest * _FIRST_OCTAVE / 2**n for n in range(levels - 1)]
        with torch.no_grad():
            self._light = x = opponent_light(original)
            self._bands: list[tuple[Tensor, Tensor, Tensor]] = []
            for level, frequency in enumerate(frequencies):
                smaller = _reduced(x)
                around = _enlarged(smaller, x.shape[-2:])
                gain = (1 if level == 0 else 2) / around[:, :1].clamp_min(0.01)
                gain = (
                    gain * _sensitivity(frequency, around[:, :1].clamp_min(0.01)) * x.new_tensor(_GAIN).view(1, 3, 1, 1)
                )
                self._bands.append((gain, 1 + self._masking((x - around) * gain), weight))
                x, weight = smaller, F.interpolate(weight, smaller.shape[-2:], mode="area")
            mean = x[:, :1].clamp_min(0.01).mean((2, 3), keepdim=True)
            self._base = x.new_tensor(_BASE).view(1, 3, 1, 1) * _sensitivity(_FREQUENCIES[0], mean) / mean
            self._base_weight = weight

    @staticmethod
    def _masking(contrast: Tensor) -> Tensor:
        radius = round(2 * _BLUR)
        kernel = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * _BLUR**2))
        blurred = _filtered(contrast.abs(), kernel / kernel.sum()) * _MASKED
        powers = contrast.new_tensor(_MASKING).view(1, 3, 1, 1)
        return torch.einsum("ck,bchw->bkhw", 2 ** contrast.new_tensor(_CROSS), blurred.clamp_min(1e-6) ** powers)

    def __call__(self, pictures: Tensor) -> Tensor:
        """Visible difference of pictures (B, 3, H, W) in [-1, 1] to the originals, differentiable.

        Returns:
            (B,), JOD below 10: 0 where nothing is seen, 1 where three of four viewers tell the two apart.  Equal
            pictures have less than 0.001, since the roots' gradients must stay finite.
        """
        x = opponent_light(pictures) - self._light
        seen = []
        for gain, masking, weight in self._bands:
            smaller = _reduced(x)
            contrast = (x - _enlarged(smaller, x.shape[-2:])) * gain
            difference = (contrast.square() + 1e-6) ** (_POWER / 2) / masking
            seen.append(_pooled(_LARGEST * difference / (_LARGEST + difference), weight))
            x = smaller
        seen.append(_pooled((x * self._base).abs(), self._base_weight))
        whole = _STILL * torch.stack(seen, 1).pow(4).sum((1, 2)).pow(0.25)
        return _JOD * whole**_JOD_POWER


def _pooled(difference: Tensor, weight: Tensor) -> Tensor:
    """Root mean square over the picture, (B, 3)."""
    return ((difference.square() * weight).mean((2, 3)) / weight.mean((2, 3)) + 1e-10).sqrt()
