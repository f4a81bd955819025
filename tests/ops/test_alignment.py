"""FFHQ crops: the rule by hand, geometry, filtering, the photo's edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scol_ops.alignment import align, align_crops, ffhq_quads, landmarks_in_crops
from scol_ops.detection import FaceDetector
from scol_ops.warp import GeometryError, crop_transform, warp_affine

LANDMARKS = torch.tensor([[[100.0, 100], [160, 100], [131, 140], [105, 170], [155, 170]]])

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads wait for each other on a busy machine, many times longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def square(centre_x: float, centre_y: float, side: float, degrees: float = 0) -> torch.Tensor:
    a = math.radians(degrees)
    x = torch.tensor([math.cos(a), math.sin(a)], dtype=torch.float64) * side / 2
    y = torch.tensor([-math.sin(a), math.cos(a)], dtype=torch.float64) * side / 2
    centre = torch.tensor([centre_x, centre_y], dtype=torch.float64)
    return torch.stack([centre - x - y, centre - x + y, centre + x + y, centre + x - y])[None]


def to_float(photo: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


def test_rule_by_hand():
    # Eyes' middle (130, 100), mouth's (130, 170): half side max(2 * 60, 1.8 * 70) = 126 about (130, 107).
    expected = torch.tensor([[[4, -19], [4, 233], [256, 233], [256, -19]]], dtype=torch.float64)
    quads = ffhq_quads(LANDMARKS)
    assert quads.dtype == torch.float64
    assert torch.allclose(quads, expected, atol=1e-9)


def test_quad_moves_with_the_face():
    a, scale, shift = math.radians(31), 2.7, torch.tensor([40.0, -11], dtype=torch.float64)
    turn = scale * torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64)
    moved = LANDMARKS.double() @ turn.T + shift
    assert torch.allclose(ffhq_quads(moved), ffhq_quads(LANDMARKS) @ turn.T + shift, atol=1e-9)


def test_generated_faces_are_already_aligned(draw_face):
    # The generator was trained on FFHQ's crops, so its pictures' own quads are about their outlines.
    faces = [draw_face(seed) for seed in range(6)]
    outline = torch.tensor([[-0.5, -0.5], [-0.5, 255.5], [255.5, 255.5], [255.5, -0.5]], dtype=torch.float64)
    landmarks = np.stack([f[0].landmarks for f in FaceDetector().detect(faces)])
    error = ffhq_quads(torch.from_numpy(landmarks)) - outline
    assert error.abs().max() < 0.1 * 256
    assert error.mean(0).abs().max() < 0.04 * 256


def test_whole_picture_is_itself(draw_face):
    face = draw_face(0)
    crop = align_crops(face, square(127.5, 127.5, 256))
    assert crop.shape == (1, 3, 256, 256)
    assert torch.allclose(crop, to_float(face), atol=1e-4)


def test_array_and_tensor_alike(noise):
    quads = torch.cat([square(60, 45, 30, 20), square(3, 4, 60, -40), square(110, 85, 200, 5), square(-20, 40, 40)])
    both = align_crops(noise, quads, 32)
    assert torch.allclose(both, align_crops(to_float(noise), quads, 32), atol=1e-5)
    for i in range(len(quads)):
        assert torch.equal(align_crops(noise, quads[i : i + 1], 32)[0], both[i])


def test_cutting_a_window_changes_nothing(noise):
    """Only a part of the photo is converted; the crop is as if all of it were, mirrored at all its edges."""
    for quad in (square(60, 45, 30, 20), square(3, 4, 60, -40), square(118, 80, 50, 10), square(60, 45, 500)):
        whole = warp_affine(to_float(noise), crop_transform(quad, 64).float(), 64, padding="reflection",
                            mode="bicubic" if quad[0, 2, 0] - quad[0, 0, 0] < 90 else "bilinear")
        assert torch.allclose(align_crops(noise, quad, 64), whole.clamp(-1, 1), atol=2e-3)


def test_mirror_beyond_the_edge(noise):
    padded = np.pad(noise, ((40, 40), (40, 40), (0, 0)), mode="symmetric")
    quad = square(10, 12, 60, 15)
    assert torch.allclose(align_crops(noise, quad, 60), align_crops(padded, quad + 40, 60), atol=2e-3)


def test_no_aliasing_when_shrinking():
    board = np.indices((1024, 1024)).sum(0) % 2 * 255
    crop = align_crops(np.repeat(board[..., None], 3, 2).astype(np.uint8), square(512, 512, 900, 13), 256)
    assert crop.abs().max() < 0.15  # the mean; every fourth pixel alone would give -1 and 1


def test_small_faces_are_enlarged(draw_face):
    face = draw_face(3)
    small = align_crops(face, square(127.5, 127.5, 256), 64)
    photo = ((small[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    large = align_crops(photo, square(31.5, 31.5, 64))
    assert large.shape[-1] == 256 and large.min() >= -1 and large.max() <= 1
    again = torch.nn.functional.avg_pool2d(large, 4)
    assert (again - small).square().mean().sqrt() < 0.03


def test_align_puts_landmarks_where_the_rule_says():
    photo = np.full((300, 300, 3), 80, np.uint8)
    result = align(photo, LANDMARKS[0].numpy(), 128)
    assert result.size == 128 and result.crops.shape == (1, 3, 128, 128) and result.landmarks.dtype == torch.float32
    expected = (LANDMARKS - torch.tensor([4.0, -19])) * 128 / 252 - 0.5
    assert torch.allclose(result.landmarks, expected, atol=1e-4)
    assert torch.equal(result.landmarks, landmarks_in_crops(LANDMARKS, result.quads, 128))
    # A white dot at a landmark is seen there in the crop.
    photo[139:142, 130:133] = 255
    crop = align(photo, LANDMARKS, 128).crops[0].mean(0)
    y, x = divmod(int(crop.argmax()), 128)
    assert abs(x - float(result.landmarks[0, 2, 0])) <= 1 and abs(y - float(result.landmarks[0, 2, 1])) <= 1


def test_no_faces(noise):
    assert align(noise, np.zeros((0, 5, 2))).crops.shape == (0, 3, 256, 256)


def test_bad_input(noise):
    with pytest.raises(GeometryError):
        ffhq_quads(torch.zeros(1, 5, 2))
    with pytest.raises(GeometryError):
        ffhq_quads(LANDMARKS * float("nan"))
    with pytest.raises(ValueError):
        ffhq_quads(LANDMARKS[0])
    with pytest.raises(ValueError):
        align_crops(noise.astype(np.float32), square(5, 5, 5))
    with pytest.raises(ValueError):
        align_crops(torch.zeros(2, 3, 9, 9), square(5, 5, 5))
    with pytest.raises(GeometryError):
        align_crops(noise, square(5, 5, 5)[:, [0, 2, 1, 3]])
