"""Masks and paste-back: only the face changes, the change survives, overlaps are not doubled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from scol_ops.alignment import align, align_crops, ffhq_quads
from scol_ops.detection import FaceDetector
from scol_ops.paste import change_mask, face_mask, paste_back
from tests.ops.test_alignment import square

# Where FFHQ's rule puts the landmarks of a face that looks straight on, at 256 px.
FRONTAL = torch.tensor([[[96.0, 119], [160, 119], [128, 155], [100, 187], [156, 187]]])


def psnr(a: torch.Tensor, b: torch.Tensor, where: torch.Tensor) -> float:
    error = ((a - b) / 2).square().mean(1, keepdim=True)[where].mean()
    return float(-10 * torch.log10(error))


def noise(seed: int, size: int = 256, strength: float = 0.06) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) * strength


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads wait for each other on a busy machine, many times longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(1).integers(30, 226, (200, 260, 3), dtype=np.uint8)


def test_mask_covers_the_face_only():
    mask = face_mask(FRONTAL)
    assert mask.shape == (1, 1, 256, 256) and mask.dtype == torch.float32
    assert mask.min() == 0 and mask.max() == 1
    mask = mask[0, 0]
    assert all(mask[int(y), int(x)] == 1 for x, y in FRONTAL[0].tolist())
    assert mask[75, 128] > 0.9 and mask[225, 128] > 0.5  # forehead, chin
    assert mask[:50].max() == 0 and mask[:, :35].max() == 0 and mask[:, 221:].max() == 0  # hair, background
    assert torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).max() == 0
    assert 0.25 < mask.mean() < 0.42
    steps = torch.maximum(mask.diff(dim=0).abs().max(), mask.diff(dim=1).abs().max())
    assert steps < 0.15  # soft


def test_mask_turns_with_the_face():
    a = np.deg2rad(25)
    turn = torch.tensor([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]], dtype=torch.float32)
    turned = face_mask((FRONTAL - 127.5) @ turn.T + 127.5)[0, 0].numpy()
    rotated = Image.fromarray(face_mask(FRONTAL)[0, 0].numpy()).rotate(-25, Image.Resampling.BILINEAR)
    assert np.abs(turned - np.array(rotated)).max() < 0.05


def test_mask_follows_a_turned_head():
    """The nose to the image's left: less cheek there, more on the other side; and the mirror image likewise."""
    left = FRONTAL.clone()
    left[0, 2, 0] -= 16
    mask, frontal = face_mask(left)[0, 0], face_mask(FRONTAL)[0, 0]
    assert mask[:, :128].sum() < 0.9 * frontal[:, :128].sum()
    assert mask[:, 128:].sum() >= frontal[:, 128:].sum()
    mirrored = left.clone()
    mirrored[..., 0] = 255 - left[..., 0]
    mirrored = mirrored[:, [1, 0, 2, 4, 3]]
    assert torch.allclose(face_mask(mirrored)[0, 0], mask.flip(1), atol=1e-4)


def test_mask_ends_at_the_crops_edge():
    mask = face_mask(FRONTAL + torch.tensor([100.0, 40]))[0, 0]
    assert mask[:, -1].max() == 0 and mask[-1].max() == 0 and mask.max() > 0.9


def test_where_a_face_may_change_is_the_face_unless_asked_otherwise():
    assert torch.equal(change_mask(FRONTAL), face_mask(FRONTAL))
    assert torch.equal(change_mask(FRONTAL, 64, scale=1, features=1), face_mask(FRONTAL, 64))
    face, wide = face_mask(FRONTAL)[0, 0], change_mask(FRONTAL, scale=1.7)[0, 0]
    assert wide.mean() > 1.3 * face.mean() and face[60, 128] < 0.3 < wide[60, 128], "hair"
    for scale in (0.5, 1.0, 1.7, 4.0):
        for points in (FRONTAL, FRONTAL + torch.tensor([60.0, 20])):
            mask = change_mask(points, scale=scale, features=0.3)[0, 0]
            assert torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).max() == 0
            assert mask.min() == 0 and mask.max() <= 1
    steps = torch.maximum(wide.diff(dim=0).abs().max(), wide.diff(dim=1).abs().max())
    assert steps < 0.15, "soft"


@pytest.mark.parametrize("features", [0.0, 0.3])
def test_features_are_spared_wherever_they_lie(features):
    a = np.deg2rad(25)
    turn = torch.tensor([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]], dtype=torch.float32)
    for points in (FRONTAL, (FRONTAL - 127.5) @ turn.T + 127.5, FRONTAL / 2 + 40):
        whole, spared = (change_mask(points, features=share)[0, 0] for share in (1.0, features))
        eyes, mouth = points[0, :3], points[0, 3:].mean(0, keepdim=True)
        for x, y in torch.cat([eyes, mouth]).round().long().tolist():
            assert spared[y, x] < (features + 0.1) * whole[y, x]
        assert (spared <= whole + 1e-6).all() and (spared >= features * whole - 1e-6).all()
        below_the_eye = points[0, 0] * 0.6 + points[0, 3] * 0.4
        x, y = (below_the_eye + (points[0, 0] - points[0, 1]) * 0.25).round().long().tolist()
        assert spared[y, x] > 0.8 * whole[y, x] > 0.5, "cheeks"
    two = change_mask(torch.cat([FRONTAL, FRONTAL / 2 + 40]), features=features)
    assert torch.allclose(two[1], change_mask(FRONTAL / 2 + 40, features=features)[0], atol=1e-6)


def test_no_change_no_change(photo):
    quads = square(120, 90, 100, 12)
    crops = align_crops(photo, quads)
    result = paste_back(photo, crops, crops, face_mask(FRONTAL), quads)
    assert np.array_equal(result, photo) and result is not photo
    assert np.array_equal(paste_back(photo, crops[:0], crops[:0], crops[:0, :1], quads[:0]), photo)


@pytest.mark.parametrize("side", [40, 130, 256, 900])
def test_pixels_outside_the_mask_are_bit_equal(photo, side):
    quads, mask = square(120, 90, side, 12), face_mask(FRONTAL)
    crops, before = align_crops(photo, quads), photo.copy()
    result = paste_back(photo, crops, crops + noise(0, strength=0.5), mask, quads)
    assert np.array_equal(photo, before)
    # A disc about the quad's centre holds all of the face's outline.
    y, x = np.indices(photo.shape[:2])
    far = np.hypot(x - 120, y - 90) > 0.48 * side + 2
    assert np.array_equal(result[far], photo[far])
    assert (result != photo).any()


@pytest.mark.parametrize("side", [256, 300, 700])
def test_change_survives_in_faces_of_crop_size_and_larger(draw_face, side):
    """Cut out again, the photo shows the protected crop, even with a change of single pixels."""
    face = Image.fromarray(draw_face(1)).resize((side, side), Image.Resampling.BICUBIC)
    image = np.full((side + 100, side + 130, 3), 110, np.uint8)
    image[50 : 50 + side, 60 : 60 + side] = np.array(face.rotate(7, Image.Resampling.BICUBIC, fillcolor=(110,) * 3))
    (found,) = FaceDetector().detect([image])[0]
    cut = align(image, found.landmarks)
    mask = face_mask(cut.landmarks)
    goal = cut.crops + mask * ((cut.crops + noise(2)).clamp(-1, 1) - cut.crops)
    assert psnr(cut.crops, goal, mask > 0.5) < 33  # the change is not so small that anything would pass

    pasted = paste_back(image, cut.crops, goal, mask, cut.quads, masked=True)
    assert psnr(align_crops(pasted, cut.quads), goal, mask > 0.5) > 38
    plain = paste_back(image, cut.crops, goal, mask, cut.quads, masked=True, corrections=0)
    assert psnr(align_crops(pasted, cut.quads), goal, mask > 0.5) > psnr(
        align_crops(plain, cut.quads), goal, mask > 0.5
    )


@pytest.mark.parametrize("corrections", [1, 3])
@pytest.mark.parametrize("side", [60, 130, 256, 300, 700])
def test_no_pixel_of_the_photo_changes_more_than_one_of_the_crop(side, corrections):
    """Interpolation and back-projection swing: whoever bounds the change of the crop has bounded the photo's."""
    photo, limit = np.full((300, 320, 3), 128, np.uint8), 20  # of 255
    quads, mask = square(160, 150, side, 12), face_mask(FRONTAL)
    crops = align_crops(photo, quads)
    change = noise(6).sign() * limit / 127.5
    for goal in (crops + change, crops + mask * change):
        pasted = paste_back(photo, crops, goal, mask, quads, masked=True, corrections=corrections)
        moved = np.abs(pasted.astype(int) - photo)
        assert moved.max() <= limit + 0.5
        assert moved.max() > (0.9 if side >= 256 else 0.1) * limit, "there is a change to be bounded"


def test_smooth_change_survives_in_a_small_face(draw_face):
    image = np.full((200, 220, 3), 110, np.uint8)
    image[40:160, 50:170] = np.array(Image.fromarray(draw_face(1)).resize((120, 120), Image.Resampling.BICUBIC))
    (found,) = FaceDetector().detect([image])[0]
    cut = align(image, found.landmarks)
    mask = face_mask(cut.landmarks)
    change = torch.nn.functional.interpolate(noise(3, 16), size=256, mode="bicubic")
    goal = (cut.crops + mask * change).clamp(-1, 1)
    pasted = paste_back(image, cut.crops, goal, mask, cut.quads, masked=True)
    assert psnr(align_crops(pasted, cut.quads), goal, mask > 0.5) > 45


def test_mask_is_applied_once(photo):
    quads, mask = square(120, 90, 256), torch.full((1, 1, 256, 256), 0.5)
    photo = np.full_like(photo, 100)
    crops = align_crops(photo, quads)
    for masked, expected in ((False, 110), (True, 120)):
        result = paste_back(photo, crops, crops + 20 / 127.5, mask, quads, masked=masked, corrections=0)
        assert set(np.unique(result[40:140, 60:180])) == {expected}


def test_overlap_is_not_changed_twice(photo):
    photo = np.full_like(photo, 100)
    quads = torch.cat([square(100, 90, 128), square(140, 90, 128)])
    crops = align_crops(photo, quads)
    full = torch.zeros(2, 1, 256, 256)
    full[..., 40:216, 40:216] = 1
    result = paste_back(photo, crops, crops + 40 / 127.5, full, quads, corrections=0)
    assert result.max() == 140 and set(np.unique(result[70:110, 70:170])) == {140}
    # Different changes meet halfway.
    both = torch.stack([crops[0] + 40 / 127.5, crops[1] - 20 / 127.5])
    result = paste_back(photo, crops, both, full, quads, corrections=0)
    assert result[90, 120].tolist() == [110] * 3 and result[90, 70].tolist() == [140] * 3
    assert result[90, 170].tolist() == [80] * 3
    assert np.array_equal(result, paste_back(photo, crops.flip(0), both.flip(0), full, quads.flip(0), corrections=0))


def test_many_faces_as_one_by_one(photo):
    quads = torch.cat([square(50, 60, 60, 10), square(200, 140, 70, -20), square(60, 150, 50)])
    crops, mask = align_crops(photo, quads), face_mask(FRONTAL).expand(3, -1, -1, -1)
    changed = crops + noise(4).expand_as(crops)
    expected = photo
    for i in range(3):
        one = slice(i, i + 1)
        expected = paste_back(expected, crops[one], changed[one], mask[one], quads[one])
    assert np.array_equal(paste_back(photo, crops, changed, mask, quads), expected)


def test_values_are_clipped_and_rounded_half_to_even():
    quads, mask = square(31.5, 31.5, 64), torch.ones(1, 1, 64, 64)
    mask[..., 0, :] = mask[..., -1, :] = mask[..., 0] = mask[..., -1] = 0

    def change(start: int, steps: float) -> int:
        photo = np.full((64, 64, 3), start, np.uint8)
        crops = align_crops(photo, quads, 64)
        return int(paste_back(photo, crops, crops + steps / 127.5, mask, quads, corrections=0)[32, 32, 0])

    assert change(250, 30) == 255 and change(5, -30) == 0
    # 0.5 / 127.5 is not exact, so the change is made from numbers that are.
    photo = np.full((64, 64, 3), 100, np.uint8)
    result = paste_back(photo, torch.zeros(1, 3, 64, 64), torch.full((1, 3, 64, 64), 1.0), mask, quads, corrections=0)
    assert result[32, 32, 0] == 228  # 227.5
    photo[:] = 101
    result = paste_back(photo, torch.zeros(1, 3, 64, 64), torch.full((1, 3, 64, 64), 1.0), mask, quads, corrections=0)
    assert result[32, 32, 0] == 228  # 228.5


def test_face_over_the_photos_edge(photo):
    for quads in (square(5, 5, 100, 10), square(258, 100, 120), square(-300, -300, 100)):
        crops = align_crops(photo, quads)
        result = paste_back(photo, crops, crops + noise(5, strength=0.3), face_mask(FRONTAL), quads)
        assert result.shape == photo.shape
        inside = bool(((quads > 0).all(-1) & (quads[..., 0] < 260)).any())
        assert (result != photo).any() == inside


def test_quads_from_landmarks_fit(photo):
    assert torch.allclose(ffhq_quads(FRONTAL).mean(1), torch.tensor([[128.0, 125.8]], dtype=torch.float64))


def test_bad_input(photo):
    quads, mask = square(100, 90, 100), face_mask(FRONTAL)
    crops = align_crops(photo, quads)
    with pytest.raises(ValueError, match="uint8"):
        paste_back(photo.astype(np.float32), crops, crops, mask, quads)
    with pytest.raises(ValueError, match="masks"):
        paste_back(photo, crops, crops, mask[0], quads)
    with pytest.raises(ValueError, match="protected"):
        paste_back(photo, crops, crops[..., :100], mask, quads)
    with pytest.raises(ValueError, match="finite"):
        paste_back(photo, crops, crops * float("nan"), mask, quads)
    with pytest.raises(ValueError):
        face_mask(FRONTAL[0])
    with pytest.raises(ValueError):
        face_mask(FRONTAL, feather=0)
    for wrong in ({"features": 1.1}, {"features": -0.1}, {"scale": 0}):
        with pytest.raises(ValueError):
            change_mask(FRONTAL, **wrong)
