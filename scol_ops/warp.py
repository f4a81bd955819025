"""Geometry shared by alignment, recognisers and paste-back: affine warps of pictures and points.

Conventions, everywhere in ``scol_ops``: coordinates are x, y in pixels with pixel centres at integers, so a picture
W pixels wide covers -0.5 to W - 0.5.  Matrices act on column vectors (x, y, 1).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# A scale of up to 1 % over 1:1 is sampled once a pixel: it is rounding of a 1:1 warp, and filtering would only blur.
_SAME_SCALE = 1.01
_SAMPLES_AT_ONCE = 1 << 18


class GeometryError(ValueError):
    """Points or matrices from which no transform can be made (coincident points, singular matrix, not a square)."""


def _check_matrix(matrix: Tensor) -> None:
    if matrix.ndim < 2 or matrix.shape[-2:] not in ((2, 3), (3, 3)):
        raise ValueError(f"matrix must be (..., 2, 3) or (..., 3, 3), got {tuple(matrix.shape)}")


def transform_points(points: Tensor, matrix: Tensor) -> Tensor:
    """Apply affine maps to points.

    Args:
        points: (..., N, 2) x, y in pixels.
        matrix: (..., 2, 3) or (..., 3, 3), batch dimensions broadcasting with those of ``points``; of a 3 x 3 matrix
            the last row is taken to be 0 0 1.

    Returns:
        (..., N, 2), in the wider of the two dtypes.

    Raises:
        ValueError: wrong shapes.
    """
    _check_matrix(matrix)
    if points.ndim < 2 or points.shape[-1] != 2:
        raise ValueError(f"points must be (..., N, 2), got {tuple(points.shape)}")
    dtype = torch.promote_types(points.dtype, matrix.dtype)
    points, matrix = points.to(dtype), matrix.to(dtype)
    return points @ matrix[..., :2, :2].mT + matrix[..., None, :2, 2]


def transform_boxes(boxes: Tensor, matrix: Tensor) -> Tensor:
    """Carry upright boxes through similarity transforms: the centre is mapped, width and height are scaled.

    A rotated box's bounding box would grow with the angle; a detector run on the turned picture would not see the
    face grow, so the size is kept.

    Args:
        boxes: (..., N, 4) x0, y0, x1, y1 in pixels.
        matrix: (..., 2, 3) or (..., 3, 3) similarity; batch dimensions broadcast.

    Returns:
        (..., N, 4).

    Raises:
        ValueError: wrong shapes.
    """
    if boxes.ndim < 2 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must be (..., N, 4), got {tuple(boxes.shape)}")
    centre = transform_points((boxes[..., :2] + boxes[..., 2:]) / 2, matrix)
    scale = torch.linalg.det(matrix[..., :2, :2]).abs().sqrt()
    half = (boxes[..., 2:] - boxes[..., :2]) / 2 * scale[..., None, None]
    return torch.cat([centre - half, centre + half], dim=-1)


def invert_affine(matrix: Tensor) -> Tensor:
    """The inverse map of an affine matrix, same shape and dtype; differentiable.

    Args:
        matrix: (..., 2, 3) or (..., 3, 3) with last row 0 0 1.

    Raises:
        ValueError: wrong shape.
        GeometryError: a singular or non-finite matrix.
    """
    _check_matrix(matrix)
    linear, shift = matrix[..., :2, :2], matrix[..., :2, 2:]
    determinant = torch.linalg.det(linear.detach())
    if not bool(torch.isfinite(determinant).all()) or bool((determinant.abs() < 1e-20).any()):
        raise GeometryError("affine matrix is singular or not finite")
    inverse = torch.linalg.inv(linear)
    upper = torch.cat([inverse, -inverse @ shift], dim=-1)
    return upper if matrix.shape[-2] == 2 else torch.cat([upper, matrix[..., 2:, :]], dim=-2)


def similarity_transform(src: Tensor, dst: Tensor) -> Tensor:
    """Least-squares similarity (rotation, one scale, shift; no reflection) that brings ``src`` to ``dst``.

    Minimises the squared distances at ``dst``.  In the plane Umeyama's problem (IEEE PAMI 13(4), 1991) restricted to
    proper rotations is linear regression with one complex factor, so there is a closed form and no SVD, whose gradient
    is undefined at equal singular values.

    Args:
        src: (B, N, 2) points, N >= 2.
        dst: (N, 2) or (B, N, 2).

    Returns:
        (B, 2, 3): ``transform_points(src, result)`` is nearest ``dst``.  To cut the aligned picture out with
        ``warp_affine`` (output -> input) pass ``invert_affine(result)``.

    Raises:
        ValueError: wrong shapes.
        GeometryError: coincident or non-finite points.
    """
    if src.ndim != 3 or src.shape[-1] != 2 or src.shape[1] < 2:
        raise ValueError(f"src must be (B, N, 2) with N >= 2, got {tuple(src.shape)}")
    if dst.shape not in (src.shape, src.shape[1:]):
        raise ValueError(f"dst must be {tuple(src.shape[1:])} or {tuple(src.shape)}, got {tuple(dst.shape)}")
    dst = dst.to(src).expand(src.shape)
    src_mean, dst_mean = src.mean(1, keepdim=True), dst.mean(1, keepdim=True)
    s, d = src - src_mean, dst - dst_mean
    spread = s.square().sum((1, 2))
    if not bool(torch.isfinite(spread).all() & torch.isfinite(dst).all()) or bool((spread <= 1e-12).any()):
        raise GeometryError("points coincide or are not finite: no similarity transform")
    real = (s * d).sum((1, 2)) / spread
    imag = (s[..., 0] * d[..., 1] - s[..., 1] * d[..., 0]).sum(1) / spread
    linear = torch.stack([torch.stack([real, -imag], -1), torch.stack([imag, real], -1)], -2)
    shift = dst_mean.mT - linear @ src_mean.mT
    return torch.cat([linear, shift], dim=-1)


def crop_transform(quad: Tensor, size: int) -> Tensor:
    """The map from pixel coordinates of a square crop to pixel coordinates of the photo.

    This is what ``warp_affine`` takes to cut the crop out; ``invert_affine`` of it maps photo to crop (and pastes
    back).  The quad's corners are those of the crop's area, half a pixel outside the outermost pixel centres, which is
    what FFHQ's script does (github.com/NVlabs/ffhq-dataset: it hands quad + 0.5 to Pillow, whose pixel centres are at
    0.5).

    Args:
        quad: (..., 4, 2) corners in the photo: top-left, bottom-left, bottom-right, top-right (design.md).
        size: side of the crop in pixels.

    Returns:
        (..., 3, 3), dtype and device of ``quad``.

    Raises:
        ValueError: wrong shape or size.
        GeometryError: not a square of positive side (to 0.1 % of its side), mirrored, or not finite.
    """
    if quad.ndim < 2 or quad.shape[-2:] != (4, 2):
        raise ValueError(f"quad must be (..., 4, 2), got {tuple(quad.shape)}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    top_left, bottom_left, bottom_right, top_right = quad.unbind(-2)
    along_x, along_y = (top_right - top_left) / size, (bottom_left - top_left) / size
    with torch.no_grad():
        # In a square the left edge is the top edge turned by 90 degrees, and the fourth corner closes it.
        side = along_x.norm(dim=-1) * size
        turned = torch.stack([-along_x[..., 1], along_x[..., 0]], -1)
        error = torch.maximum(
            (along_y - turned).norm(dim=-1) * size, (bottom_right - bottom_left - top_right + top_left).norm(dim=-1)
        )
        if not bool((torch.isfinite(side) & (side > 1e-6) & (error <= 1e-3 * side)).all()):
            raise GeometryError("quad is not a square in the order top-left, bottom-left, bottom-right, top-right")
    shift = top_left + (along_x + along_y) / 2
    upper = torch.stack([along_x, along_y, shift], dim=-1)
    last = upper.new_tensor([0.0, 0.0, 1.0]).expand(*upper.shape[:-2], 1, 3)
    return torch.cat([upper, last], dim=-2)


def _samples_per_axis(matrix: Tensor) -> list[int]:
    """For each matrix, how many samples an axis keep neighbouring samples at most one input pixel apart."""
    scale = torch.linalg.matrix_norm(matrix[:, :2, :2].detach().double().cpu(), ord=2)
    return [1 if s <= _SAME_SCALE else math.ceil(s - 1e-3) for s in scale.tolist()]


def _grid(matrix: Tensor, rows: range, width: int, k: int) -> tuple[Tensor, Tensor]:
    """Input coordinates x, y, each (B, k * len(rows), k * width), of the k x k samples of those rows' pixels."""
    ys = (torch.arange(rows.start * k, rows.stop * k, dtype=matrix.dtype, device=matrix.device) + 0.5) / k - 0.5
    xs = (torch.arange(width * k, dtype=matrix.dtype, device=matrix.device) + 0.5) / k - 0.5
    m = matrix[:, :2, :, None, None]
    x = m[:, 0, 0] * xs + m[:, 0, 1] * ys[:, None] + m[:, 0, 2]
    y = m[:, 1, 0] * xs + m[:, 1, 1] * ys[:, None] + m[:, 1, 2]
    return x, y


def _sample(
    image: Tensor, matrix: Tensor, rows: range, width: int, k: int, padding: str, fill: float, mode: str
) -> Tensor:
    """``warp_affine`` for matrices (B, 2 or 3, 3) of one k, and some rows of the output."""
    (batch, height), (_, channels, in_height, in_width) = (len(matrix), len(rows)), image.shape
    x, y = _grid(matrix, rows, width, k)
    grid = torch.stack([(2 * x + 1) / in_width - 1, (2 * y + 1) / in_height - 1], -1).to(image.dtype)
    if image.shape[0] == 1:  # the faces' grids one above the other: one picture, read and not expanded
        grid = grid.reshape(1, batch * height * k, width * k, 2)
    picture = F.grid_sample(
        image, grid, mode=mode, padding_mode="zeros" if padding == "constant" else padding, align_corners=False
    )
    if image.shape[0] == 1:
        picture = picture[0].reshape(channels, batch, height * k, width * k).transpose(0, 1)
    if fill != 0:  # the share of each sample's weights that lies inside the picture, and fill for the rest
        inside_x = torch.minimum(x + 1, in_width - x).clamp(0, 1)
        inside_y = torch.minimum(y + 1, in_height - y).clamp(0, 1)
        picture = picture + fill * (1 - inside_x * inside_y)[:, None].to(image.dtype)
    return F.avg_pool2d(picture, k) if k > 1 else picture


def warp_affine(
    image: Tensor,
    matrix: Tensor,
    size: int | tuple[int, int],
    *,
    padding: Literal["constant", "border", "reflection"] = "constant",
    fill: float = 0.0,
    mode: Literal["bilinear", "bicubic"] = "bilinear",
    antialias: bool = True,
) -> Tensor:
    """Resample pictures through affine maps; differentiable to the pixels and to the matrices.

    Where the map shrinks (more than one input pixel per output pixel) each output pixel is the mean of k x k
    interpolated samples spread evenly over its own area, k the smallest number that leaves at most one input pixel
    between samples.  This is an area filter that follows the rotation, needs no copy of the photo, and depends only on
    the sample's own matrix: a face gives the same result alone or in a batch.  Where the map enlarges, k is 1: plain
    interpolation.

    Args:
        image: (B, C, H, W) float, or (1, C, H, W) to take all B outputs from one picture without copying it.
        matrix: (B, 2, 3) or (B, 3, 3), output pixel coordinates -> input pixel coordinates.
        size: side, or (height, width), of the output.
        padding: what lies outside the picture: ``fill``, its outermost pixels, or its mirror image.
        fill: value outside, for padding "constant" ([-1, 1] pictures: -1 is black).  A sample within one pixel of the
            edge is interpolated between picture and fill.
        mode: interpolation between pixels; "bicubic" may overshoot the range, and takes no fill but 0.
        antialias: False samples once a pixel whatever the scale.

    Returns:
        (B, C, height, width), dtype of ``image``.  On CUDA the gradient to the pixels is summed by atomic additions,
        so it repeats only to rounding.

    Raises:
        ValueError: wrong shapes, sizes or options.
    """
    _check_matrix(matrix)
    height, width = (size, size) if isinstance(size, int) else size
    if image.ndim != 4 or not image.is_floating_point() or 0 in image.shape[1:]:
        raise ValueError(f"image must be a float (B, C, H, W), got {image.dtype} {tuple(image.shape)}")
    if matrix.ndim != 3 or image.shape[0] not in (1, matrix.shape[0]):
        raise ValueError(f"{image.shape[0]} images do not go with matrices of shape {tuple(matrix.shape)}")
    if height < 1 or width < 1:
        raise ValueError(f"size must be at least 1 x 1, got {height} x {width}")
    if padding not in ("constant", "border", "reflection") or mode not in ("bilinear", "bicubic"):
        raise ValueError(f"unknown padding {padding!r} or mode {mode!r}")
    if padding != "constant":
        fill = 0.0
    if mode == "bicubic" and fill != 0:
        raise ValueError("bicubic takes no fill but 0")

    batch = matrix.shape[0]
    # At least float32: pixel coordinates have no room in half precision.
    matrix = matrix.to(device=image.device, dtype=torch.promote_types(matrix.dtype, torch.float32))
    dtype, image = image.dtype, image.to(torch.promote_types(image.dtype, torch.float32))
    counts = _samples_per_axis(matrix) if antialias else [1] * batch
    out: list[Tensor | None] = [None] * batch
    for k in sorted(set(counts)):
        rows = [i for i, c in enumerate(counts) if c == k]
        source = image if len(image) == 1 or len(rows) == batch else image[rows]
        # In strips, so that a face of thousands of pixels needs megabytes and not gigabytes.
        strip = max(1, _SAMPLES_AT_ONCE // (len(rows) * width * k * k))
        picture = torch.cat([
            _sample(source, matrix[rows], range(y, min(y + strip, height)), width, k, padding, fill, mode)
            for y in range(0, height, strip)
        ], dim=2)
        for row, one in zip(rows, picture, strict=True):
            out[row] = one
    return (torch.stack(out) if batch else image.new_zeros((0, image.shape[1], height, width))).to(dtype)
