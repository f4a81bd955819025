import math

import numpy as np
import pytest
import torch
from PIL import Image

from scol_ops import warp
from scol_ops.warp import (
    GeometryError,
    crop_transform,
    invert_affine,
    similarity_transform,
    transform_boxes,
    transform_points,
    warp_affine,
)

torch.set_num_threads(1)


def similarity(scale: float, degrees: float, dx: float, dy: float, dtype=torch.float64) -> torch.Tensor:
    c, s = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    return torch.tensor([[[c, -s, dx], [s, c, dy]]], dtype=dtype)


def noise(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def ramp(height: int, width: int) -> torch.Tensor:
    """A picture whose two channels are each pixel's x and y: interpolation reproduces it exactly."""
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return torch.stack([x, y])[None]


def test_identity_and_whole_pixel_shift_are_exact():
    image = noise(1, 3, 11, 17)
    same = warp_affine(image, similarity(1, 0, 0, 0), (11, 17))
    torch.testing.assert_close(same, image, atol=1e-5, rtol=0)
    moved = warp_affine(image, similarity(1, 0, 3, 2), (5, 6))
    torch.testing.assert_close(moved, image[:, :, 2:7, 3:9], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("scale", "degrees"), [(0.4, 0), (1.0, 30), (1.7, -20), (2.6, 75), (3.0, 0)])
def test_every_output_pixel_reads_where_the_matrix_says(scale, degrees):
    matrix = similarity(scale, degrees, 60, 50)
    out = warp_affine(ramp(200, 200), matrix, 16, antialias=True)
    points = ramp(16, 16)[0].flatten(1).T[None]
    expected = transform_points(points, matrix)[0].T.reshape(2, 16, 16)
    inside = ((expected > 5) & (expected < 194)).all(0)
    assert inside.sum() > 100
    torch.testing.assert_close(out[0][:, inside], expected[:, inside], atol=1e-9, rtol=0)


def test_halving_is_the_mean_of_two_by_two():
    image = noise(1, 3, 8, 12)
    # output pixel 0 covers input pixels 0 and 1, whose middle is 0.5
    out = warp_affine(image, similarity(2, 0, 0.5, 0.5), (4, 6))
    torch.testing.assert_close(out, torch.nn.functional.avg_pool2d(image, 2), atol=1e-5, rtol=0)


def test_shrinking_does_not_alias():
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    checker = ((x + y) % 2 * 2 - 1).float()[None, None]
    matrix = similarity(2.3, 10, 20, 5)
    filtered, plain = (warp_affine(checker, matrix, 90, antialias=a)[..., 5:-5, 5:-5] for a in (True, False))
    assert plain.std() > 0.3  # otherwise the picture could not show aliasing
    assert filtered.std() < 0.05


def test_shrinking_agrees_with_pillow():
    rng = np.random.default_rng(0)
    photo = np.asarray(Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).resize((200, 200), Image.BICUBIC))
    box = np.asarray(Image.fromarray(photo).resize((50, 50), Image.BOX), np.float32)
    image = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float()
    ours = warp_affine(image, similarity(4, 0, 1.5, 1.5), 50)[0].permute(1, 2, 0)
    assert np.abs(ours.numpy() - box).max() < 1.01  # Pillow rounds to whole levels after each of its two passes


def test_crop_agrees_with_pillows_quad():
    rng = np.random.default_rng(1)
    photo = Image.fromarray(rng.integers(0, 255, (30, 30, 3), np.uint8)).resize((240, 240), Image.BICUBIC)
    matrix = similarity(1.0, 17, 70, 40)
    size = 100
    corners = torch.tensor([[-0.5, -0.5], [-0.5, size - 0.5], [size - 0.5, size - 0.5], [size - 0.5, -0.5]]).double()
    quad = transform_points(corners[None], matrix)[0]
    theirs = photo.transform((size, size), Image.QUAD, (quad.numpy() + 0.5).flatten(), Image.BILINEAR)
    image = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None].float()
    ours = warp_affine(image, crop_transform(quad, size)[None], size)[0].permute(1, 2, 0).numpy()
    error = np.abs(ours - np.asarray(theirs, np.float32))
    assert error.mean() < 0.6 and error.max() < 4


def test_crop_transform_maps_corners_and_back():
    matrix = similarity(1.9, -33, 300, 220)
    corners = torch.tensor([[-0.5, -0.5], [-0.5, 255.5], [255.5, 255.5], [255.5, -0.5]]).double()
    quad = transform_points(corners[None], matrix)
    to_photo = crop_transform(quad, 256)
    assert to_photo.shape == (1, 3, 3)
    torch.testing.assert_close(to_photo[:, :2], matrix, atol=1e-9, rtol=0)
    torch.testing.assert_close(transform_points(quad, invert_affine(to_photo))[0], corners, atol=1e-9, rtol=0)
    # the same area cut into twice as many pixels
    torch.testing.assert_close(
        transform_points(torch.tensor([[-0.5, -0.5], [511.5, 511.5]]).double(), crop_transform(quad[0], 512)),
        quad[0, [0, 2]], atol=1e-9, rtol=0,
    )


@pytest.mark.parametrize("quad", [
    [[0, 0], [0, 10], [10, 10], [10, 5]],  # not closed
    [[0, 0], [0, 10], [20, 10], [20, 0]],  # oblong
    [[0, 0], [10, 0], [10, 10], [0, 10]],  # clockwise order: mirrored
    [[3, 3], [3, 3], [3, 3], [3, 3]],
    [[0, 0], [0, math.nan], [10, 10], [10, 0]],
])
def test_crop_transform_refuses_what_is_no_square(quad):
    with pytest.raises(GeometryError):
        crop_transform(torch.tensor(quad, dtype=torch.float64), 256)


def test_similarity_transform_recovers_a_known_one_per_sample():
    src = noise(3, 5, 2, dtype=torch.float64) * 50
    true = torch.cat([similarity(0.3, 12, 4, 5), similarity(2, -140, -9, 1), similarity(1, 0, 0, 0)])
    torch.testing.assert_close(similarity_transform(src, transform_points(src, true)), true, atol=1e-10, rtol=0)


def test_similarity_transform_is_the_least_squares_one_and_never_mirrors():
    src, dst = noise(1, 5, 2, dtype=torch.float64), noise(1, 5, 2, seed=1, dtype=torch.float64)
    best = similarity_transform(src, dst[0])
    cost = (transform_points(src, best) - dst).square().sum()
    for seed in range(20):
        d = noise(4, seed=seed, dtype=torch.float64) * 1e-2
        nudge = torch.tensor([[[d[0], -d[1], d[2]], [d[1], d[0], d[3]]]])
        assert (transform_points(src, best + nudge) - dst).square().sum() > cost
    mirrored = src * torch.tensor([-1.0, 1.0]).double()
    assert torch.linalg.det(similarity_transform(src, mirrored)[0, :, :2]) >= 0


def test_similarity_transform_refuses_coincident_points():
    with pytest.raises(GeometryError):
        similarity_transform(torch.ones(1, 5, 2), torch.rand(5, 2))
    with pytest.raises(GeometryError):
        similarity_transform(torch.full((1, 5, 2), math.nan), torch.rand(5, 2))
    with pytest.raises(GeometryError):
        invert_affine(torch.zeros(1, 2, 3))


def test_boxes_keep_their_size_under_rotation():
    box = torch.tensor([[[10.0, 20.0, 30.0, 60.0]]]).double()
    out = transform_boxes(box, similarity(0.5, 90, 0, 0))[0, 0]
    # the centre (20, 40) turns to (-40, 20) and halves; 20 x 40 becomes 10 x 20
    torch.testing.assert_close(out, torch.tensor([-25.0, 0.0, -15.0, 20.0]).double(), atol=1e-9, rtol=0)


def test_fill_border_and_reflection():
    image = torch.full((1, 1, 4, 4), 0.25)
    half_out = similarity(1, 0, -0.5, 0)  # first column half a pixel outside
    out = warp_affine(image, half_out, 4, fill=-1.0)
    assert out[0, 0, :, 0].tolist() == pytest.approx([(0.25 - 1) / 2] * 4, abs=1e-5)
    assert out[0, 0, :, 1:].flatten().tolist() == pytest.approx([0.25] * 12, abs=1e-5)
    far = warp_affine(image, similarity(3, 0, 100, 100), 4, fill=-1.0)
    torch.testing.assert_close(far, torch.full_like(far, -1.0))
    row = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    left = similarity(1, 0, -2, 0)
    assert warp_affine(row, left, (1, 4), padding="border")[0, 0, 0].tolist() == pytest.approx([1, 1, 1, 2], abs=1e-5)
    assert warp_affine(row, left, (1, 4), padding="reflection")[0, 0, 0].tolist() == pytest.approx(
        [2, 1, 1, 2], abs=1e-5)


def test_one_photo_serves_many_faces_and_a_batch_changes_nothing():
    photo = noise(1, 3, 64, 80)
    matrices = torch.cat([similarity(s, a, 10, 8) for s, a in ((0.7, 5), (2.2, -9), (1.5, 0), (2.1, 30))])
    together = warp_affine(photo, matrices, 20, fill=-1)
    expanded = warp_affine(photo.expand(4, -1, -1, -1).contiguous(), matrices, 20, fill=-1)
    alone = torch.cat([warp_affine(photo, m[None], 20, fill=-1) for m in matrices])
    assert torch.equal(together, alone) and torch.equal(together, expanded)
    assert warp_affine(photo, matrices[:0], 20).shape == (0, 3, 20, 20)


def test_strips_change_nothing(monkeypatch):
    photo = noise(1, 3, 64, 80)
    matrices = torch.cat([similarity(s, a, 10, 8) for s, a in ((2.2, -9), (2.1, 30), (0.7, 5))])
    whole = warp_affine(photo, matrices, (21, 17), fill=-1)
    monkeypatch.setattr(warp, "_SAMPLES_AT_ONCE", 17 * 9 * 4)
    torch.testing.assert_close(warp_affine(photo, matrices, (21, 17), fill=-1), whole, atol=1e-6, rtol=0)


def test_half_precision_pictures_keep_precise_coordinates():
    ramp_picture = torch.linspace(-1, 1, 2001).expand(1, 1, 8, 2001)
    out = warp_affine(ramp_picture.half(), similarity(1, 0, 1500.25, 2), 4)
    assert out.dtype == torch.float16
    expected = (1500.25 + torch.arange(4)) / 1000 - 1
    torch.testing.assert_close(out[0, 0, 0].float(), expected, atol=6e-4, rtol=0)


def test_gradients_agree_with_finite_differences():
    image = noise(2, 1, 7, 7, dtype=torch.float64).requires_grad_()
    matrix = torch.cat([similarity(0.63, 11, 1.13, 0.57), similarity(2.41, -8, -0.71, 1.37)]).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, m: warp_affine(i, m, 4, fill=-1.0), (image, matrix), eps=1e-7, atol=1e-4)
    src = noise(2, 5, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: similarity_transform(s, noise(5, 2, seed=3, dtype=torch.float64)), (src,))


@pytest.mark.parametrize("call", [
    lambda: warp_affine(torch.zeros(2, 3, 4, 4), similarity(1, 0, 0, 0).expand(3, 2, 3), 4),
    lambda: warp_affine(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), similarity(1, 0, 0, 0), 4),
    lambda: warp_affine(torch.zeros(1, 3, 4, 4), similarity(1, 0, 0, 0)[0], 4),
    lambda: warp_affine(torch.zeros(1, 3, 4, 4), similarity(1, 0, 0, 0), 0),
    lambda: warp_affine(torch.zeros(1, 3, 4, 4), similarity(1, 0, 0, 0), 4, padding="wrap"),
    lambda: warp_affine(torch.zeros(1, 3, 4, 4), similarity(1, 0, 0, 0), 4, mode="bicubic", fill=-1),
    lambda: similarity_transform(torch.zeros(5, 2), torch.zeros(5, 2)),
    lambda: similarity_transform(torch.zeros(1, 5, 2), torch.zeros(4, 2)),
    lambda: transform_points(torch.zeros(5, 3), torch.zeros(2, 3)),
    lambda: transform_boxes(torch.zeros(1, 5), torch.zeros(2, 3)),
    lambda: crop_transform(torch.zeros(3, 2), 4),
    lambda: crop_transform(torch.zeros(4, 2), 0),
    lambda: invert_affine(torch.zeros(2, 2)),
])
def test_wrong_arguments_are_refused(call):
    with pytest.raises(ValueError):
        call()


def test_same_scale_tolerance_is_small():
    assert warp._samples_per_axis(torch.cat([similarity(s, 20, 0, 0) for s in (0.5, 1.0, 1.005, 1.2, 2.0, 2.3)])) == [
        1, 1, 1, 2, 2, 3]
