"""Losses against the libraries that they follow, and transformations against what they imitate."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

from scol_ops.diversity import at_photo_scale, diversify, jpeg, quantisation_tables, random_resize_shift
from scol_ops.losses import id_lock_loss, identity_hinge_loss, multiscale_ssim_loss, reconstruction_loss, ssim_map


def picture(seed: int, size: int = 64) -> torch.Tensor:
    """Smooth colours with some texture, (1, 3, size, size) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    small = torch.from_numpy(rng.uniform(-1, 1, size=(1, 3, 8, 8)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(small, (size, size), mode="bicubic", align_corners=False)
    return (smooth + 0.05 * torch.from_numpy(rng.standard_normal((1, 3, size, size)).astype(np.float32))).clamp(-1, 1)


def test_ssim_equals_scikit_image():
    a, b = picture(0), (picture(0) + 0.1 * picture(1)).clamp(-1, 1)
    _, want = structural_similarity(
        a[0].double().numpy(), b[0].double().numpy(), channel_axis=0, data_range=2.0, gaussian_weights=True,
        sigma=1.5, use_sample_covariance=False, full=True,
    )
    got = ssim_map(a.double(), b.double())[0].numpy()
    assert np.abs(got - want[:, 5:-5, 5:-5]).max() < 1e-6


def test_reconstruction_is_zero_only_for_equal_pictures():
    a = picture(0)
    assert float(reconstruction_loss(a, a)) == pytest.approx(0, abs=1e-6)
    assert float(reconstruction_loss(a, a + 0.1, l2_weight=10, ssim_weight=0)) == pytest.approx(0.1, rel=1e-4)
    assert float(multiscale_ssim_loss(a, picture(1))) > 0.2
    with pytest.raises(ValueError, match="octaves"):
        multiscale_ssim_loss(picture(0, 16), picture(1, 16))


def test_identity_losses_by_hand():
    e1, e2 = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    assert float(id_lock_loss([e1, e1], [e1, e2])) == pytest.approx(0.2)  # mean of 0 and 0.4
    assert float(identity_hinge_loss([e2], [e1], [0.5])) == pytest.approx(0.1)
    assert float(identity_hinge_loss([e2], [e1], [0.7])) == 0.0
    # In units from one person to another: by hand, (0.1 / 0.5 + 0.3 / 1) / 2.
    assert float(identity_hinge_loss([e2, e2], [e1, e1], [0.5, 0.3], [0.5, 1.0])) == pytest.approx(0.25)
    with pytest.raises(ValueError):
        id_lock_loss([e1], [])


def to_pillow(x: torch.Tensor) -> Image.Image:
    return Image.fromarray(((x[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("quality", "subsample", "size"), [(95, False, 64), (75, True, 64), (50, True, 64), (75, True, 57)]
)
def test_jpeg_layer_resembles_pillow(quality, subsample, size):
    x = ((picture(2, size) + 1) * 127.5).round() / 127.5 - 1
    stream = io.BytesIO()
    to_pillow(x).save(stream, "JPEG", quality=quality, subsampling="4:2:0" if subsample else "4:4:4")
    saved = Image.open(stream)
    tables = saved.quantization
    saved = np.asarray(saved).astype(np.float32)
    ours = ((jpeg(x, quality, subsample)[0] + 1) * 127.5).permute(1, 2, 0).numpy()
    original = np.asarray(to_pillow(x)).astype(np.float32)
    # libjpeg rounds to integers before the transform and filters chroma otherwise, so coefficients near a rounding
    # edge fall the other way: not bit-equal, but far closer to Pillow's file than the input is, and of the same loss.
    loss, ours_to_pillow = np.mean((original - saved) ** 2), np.mean((ours - saved) ** 2)
    assert ours_to_pillow < 0.4 * loss
    assert np.mean((original - ours) ** 2) == pytest.approx(loss, rel=0.2)
    luma, chroma = quantisation_tables(quality)
    assert sorted(tables[0]) == sorted(int(v) for v in luma.flatten())
    assert sorted(tables[1]) == sorted(int(v) for v in chroma.flatten())


@pytest.mark.parametrize("size", [64, 40])
def test_jpeg_layer_passes_gradients(size):
    x = picture(3, size).requires_grad_(True)
    jpeg(x, 75).square().sum().backward()
    assert torch.isfinite(x.grad).all() and float(x.grad.abs().sum()) > 0
    with pytest.raises(ValueError, match="quality"):
        jpeg(picture(3), 0)


def test_draws_are_seeded_and_strength_zero_is_the_identity():
    x = picture(4)
    one, two, other = (
        diversify(x, torch.Generator().manual_seed(s), blur=True, jpeg_quality=(60, 90)) for s in (5, 5, 6)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert random_resize_shift(x, torch.Generator(), 0) is x


def test_photo_scale_keeps_what_the_photo_can_hold():
    x = picture(3)
    assert at_photo_scale(x, 64) is x and at_photo_scale(x, 200) is x
    ramp = torch.linspace(-0.8, 0.8, 64).expand(1, 3, 64, 64)
    assert float((at_photo_scale(ramp, 32) - ramp)[..., 4:-4].abs().max()) < 0.01
    board = (((torch.arange(64)[:, None] + torch.arange(64)) % 2).float() - 0.5).expand(1, 3, -1, -1)
    assert float(at_photo_scale(board, 24)[..., 4:-4, 4:-4].abs().max()) < 0.05
    leaf = x.clone().requires_grad_(True)
    at_photo_scale(leaf, 30).sum().backward()
    assert leaf.grad.abs().sum() > 0
