import math

import numpy as np
import pytest
import torch

from scol_ops import metrics


def picture(seed: int = 0, height: int = 32, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_to_uint8_rounds_and_clamps():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.5, -1 + 0.6 / 127.5]).reshape(1, 1, 6).expand(3, 1, 6)
    assert metrics.to_uint8(x)[0, :, 0].tolist() == [0, 0, 128, 255, 255, 1]
    assert metrics.to_uint8(x[None]).shape == (1, 1, 6, 3)
    every_level = torch.arange(256).float().reshape(1, 1, 256).expand(3, 1, 256) / 127.5 - 1
    assert metrics.to_uint8(every_level)[0, :, 1].tolist() == list(range(256))
    with pytest.raises(ValueError):
        metrics.to_uint8(torch.full((3, 2, 2), math.nan))
    with pytest.raises(ValueError):
        metrics.to_uint8(torch.zeros(2, 2, 3))


def test_psnr_by_hand():
    a = np.full((4, 5, 3), 100, np.uint8)
    b = a.copy()
    assert metrics.psnr(a, b) == math.inf
    b += 10  # mean squared error 100
    assert metrics.psnr(a, b) == pytest.approx(10 * math.log10(65025 / 100))
    assert metrics.psnr(b, a) == metrics.psnr(a, b)  # 8-bit differences must not wrap round
    black, white = np.zeros((4, 5, 3), np.uint8), np.full((4, 5, 3), 255, np.uint8)
    assert metrics.psnr(black, white) == 0
    c = a.copy()
    c[0, 0, 1] += 60  # one of 60 numbers: mean squared error 60
    assert metrics.psnr(a, c) == pytest.approx(10 * math.log10(65025 / 60))
    mask = np.zeros((4, 5), bool)
    mask[0, :2] = True  # one of 6 numbers: 600
    assert metrics.psnr(a, c, mask) == pytest.approx(10 * math.log10(65025 / 600))
    assert metrics.psnr(a, c, ~mask) == math.inf


def test_ssim_by_hand():
    a = picture()
    assert metrics.ssim(a, a) == pytest.approx(1)
    # Two flat pictures: no variances, what remains is (2 ab + c1) / (a^2 + b^2 + c1), c1 = (0.01 * 255)^2
    flat, other = np.full((20, 20, 3), 100, np.uint8), np.full((20, 20, 3), 150, np.uint8)
    c1 = 2.55**2
    assert metrics.ssim(flat, other) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), abs=1e-6)


def test_ssim_is_wangs_formula_with_gaussian_weights():
    a, b = picture(1, 11, 11), picture(2, 11, 11)  # a single window
    g = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5**2))
    weights = np.outer(g, g) / g.sum() ** 2
    values = []
    for channel in range(3):
        x, y = a[..., channel].astype(float), b[..., channel].astype(float)
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        cov = (weights * (x - mx) * (y - my)).sum()
        c1, c2 = 2.55**2, 7.65**2
        values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert metrics.ssim(a, b) == pytest.approx(np.mean(values), abs=1e-6)


def test_ssim_mask():
    a, b = picture(3, 30, 60), picture(3, 30, 60)
    b[:, 30:] = picture(4, 30, 30)
    left = np.zeros((30, 60), bool)
    left[:, :20] = True  # windows reach 5 pixels, to column 24
    assert metrics.ssim(a, b, left) == pytest.approx(1)
    assert metrics.ssim(a, b, ~left) < 0.7
    assert metrics.ssim(a, b, np.ones_like(left)) == metrics.ssim(a, b)
    edge = np.zeros_like(left)
    edge[:3] = True
    with pytest.raises(ValueError, match="centre"):
        metrics.ssim(a, b, edge)
    with pytest.raises(ValueError, match="11 x 11"):
        metrics.ssim(a[:10], b[:10])


def test_flip_orders_differences_and_takes_a_mask():
    a = np.full((64, 64, 3), 128, np.uint8)
    assert metrics.flip(a, a) == 0
    little, much = a + 4, a + 40
    assert 0 < metrics.flip(a, little) < metrics.flip(a, much) < 1
    # black against white: the paper's exponents bring the largest difference to nearly 1
    assert metrics.flip(np.zeros_like(a), np.full_like(a, 255)) > 0.9
    b = a.copy()
    b[:, 40:] = 255
    left = np.zeros((64, 64), bool)
    left[:, :16] = True
    assert metrics.flip(a, b, left) < 0.01 < 0.3 < metrics.flip(a, b, ~left)
    whole = metrics.flip(a, b)
    assert whole == pytest.approx(0.25 * metrics.flip(a, b, left) + 0.75 * metrics.flip(a, b, ~left), abs=1e-6)


def test_flip_from_farther_away_sees_less():
    a, noise = np.full((64, 64, 3), 128, np.int16), picture(5, 64, 64).astype(np.int16)
    b = (a + (noise - 128) // 4).astype(np.uint8)
    a = a.astype(np.uint8)
    assert metrics.flip(a, b, pixels_per_degree=120) < metrics.flip(a, b) < metrics.flip(a, b, pixels_per_degree=20)


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim, metrics.flip])
@pytest.mark.parametrize("change", [
    lambda a: (a, a[:-1], None),
    lambda a: (a.astype(np.float32), a, None),
    lambda a: (a, torch.from_numpy(a), None),
    lambda a: (a[..., 0], a[..., 0], None),
    lambda a: (a[:0], a[:0], None),
    lambda a: (a, a, np.zeros(a.shape[:2], bool)),
    lambda a: (a, a, np.ones(a.shape[:2], np.uint8)),
    lambda a: (a, a, np.ones((3, 3), bool)),
])
def test_wrong_pictures_are_refused(metric, change):
    with pytest.raises(ValueError):
        metric(*change(picture()))


def test_flip_refuses_a_wrong_distance():
    with pytest.raises(ValueError):
        metrics.flip(picture(), picture(), pixels_per_degree=0)


def test_ism_is_the_cosine_of_each_row():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    b = np.array([[5.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    np.testing.assert_allclose(metrics.ism(a, b), [1, -1, math.sqrt(0.5)], atol=1e-6)
    for wrong in (b[:2], b[:, :1], np.zeros((3, 2)), np.full((3, 2), math.inf), b[0]):
        with pytest.raises(ValueError):
            metrics.ism(a, wrong)


def test_rank1_u_by_hand():
    gallery = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0]], float)
    ids = ["ann", "bob", "cid", "ann"]
    probes = np.array([
        [0.9, 0.1, 0.0],  # ann: nearest ann
        [0.1, 0.9, 0.0],  # ann: cosine 0.78 with her second photo, 0.99 with bob
        [0.7, 0.7, 0.0],  # bob: nearest is ann's second photo
        [0.0, 0.1, 9.0],  # cid: nearest cid, whatever the norm
    ])
    own = ["ann", "ann", "bob", "cid"]
    assert metrics.rank1_matches(probes, own, gallery, ids).tolist() == [True, False, False, True]
    assert metrics.rank1_u(probes, own, gallery, ids) == 0.5
    assert metrics.rank1_u(torch.from_numpy(probes), np.array(own), torch.from_numpy(gallery), np.array(ids)) == 0.5


def test_a_tie_counts_against_the_protection():
    gallery = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    for ids in (["x", "other", "own"], ["x", "own", "other"]):
        assert metrics.rank1_u([[1.0, 0.2]], ["own"], gallery, ids) == 0
    assert metrics.rank1_u([[1.0, 0.2]], ["own"], [[1.0, 0.0], [1.0, 0.01]], ["own", "other"]) == 1


def test_ids_are_told_apart_by_type():
    assert metrics.rank1_u([[1.0, 0.0]], [1], [[1.0, 0.0], [0.0, 1.0]], ["1", 1]) == 1


def test_rank1_u_over_several_blocks_agrees_with_a_plain_loop():
    rng = np.random.default_rng(0)
    gallery, probes = rng.standard_normal((300, 8)), rng.standard_normal((700, 8))
    gallery_ids = list(range(100)) * 3
    probe_ids = rng.integers(0, 100, 700).tolist()
    cosines = probes @ gallery.T / np.linalg.norm(gallery, axis=1)  # a probe's own norm moves no rank
    expected = np.mean([gallery_ids[int(row.argmax())] != own for row, own in zip(cosines, probe_ids, strict=True)])
    assert metrics.rank1_u(probes, probe_ids, gallery, gallery_ids) == pytest.approx(expected)


@pytest.mark.parametrize(("probes", "own", "gallery", "ids"), [
    ([[1.0, 0.0]], ["b"], [[1.0, 0.0]], ["a"]),  # not in the gallery
    ([[1.0, 0.0]], ["a", "a"], [[1.0, 0.0]], ["a"]),
    ([[1.0, 0.0]], ["a"], [[1.0, 0.0]], ["a", "b"]),
    ([[1.0, 0.0, 0.0]], ["a"], [[1.0, 0.0]], ["a"]),
    (np.zeros((0, 2)), [], [[1.0, 0.0]], ["a"]),
    ([[0.0, 0.0]], ["a"], [[1.0, 0.0]], ["a"]),
    ([[1.0, 0.0]], ["a"], [[math.nan, 0.0]], ["a"]),
])
def test_rank1_u_refuses_what_would_flatter(probes, own, gallery, ids):
    with pytest.raises(ValueError):
        metrics.rank1_u(probes, own, gallery, ids)


def test_verification_threshold_by_hand():
    scores = np.arange(100) / 100  # 0.00 .. 0.99
    assert metrics.verification_threshold(scores, 0.01) == 0.98  # one of 100 above
    assert metrics.verification_threshold(np.random.default_rng(0).permutation(scores), 0.29) == pytest.approx(0.70)
    tied = np.array([0.5] * 10 + [0.1] * 90)
    threshold = metrics.verification_threshold(tied, 0.05)
    assert threshold == 0.5 and (tied > threshold).mean() <= 0.05
    for wrong in ((scores[:50], 0.01), ([], 0.1), (scores, 0.0), (scores, 1.0), ([math.nan] * 100, 0.1)):
        with pytest.raises(ValueError):
            metrics.verification_threshold(*wrong)


def test_candidate_ranks_by_hand():
    scores = np.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.2, 0.2, 0.2]])
    assert metrics.candidate_ranks([0.6, 0.05, 0.2], scores).tolist() == [2, 4, 1]  # the last one ties with all
    others = np.array([[False, True, True], [True, False, True], [True, True, True]])
    assert metrics.candidate_ranks([0.6, 0.05, 0.1], scores, others).tolist() == [1, 3, 4]
    for wrong in (([0.1], scores), ([0.1, 0.2, math.nan], scores), ([0.1] * 3, scores, np.zeros_like(others))):
        with pytest.raises(ValueError):
            metrics.candidate_ranks(*wrong)


def test_candidate_ranks_agree_with_rank1_u():
    rng = np.random.default_rng(3)
    gallery, probes = rng.standard_normal((40, 6)), rng.standard_normal((40, 6)) * 0.7
    probes += gallery * 0.5
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (probes, gallery)]
    cosines = unit[0] @ unit[1].T
    ranks = metrics.candidate_ranks(cosines.diagonal(), cosines, ~np.eye(40, dtype=bool))
    assert 0 < (ranks > 1).mean() < 1
    assert (ranks > 1).mean() == metrics.rank1_u(probes, range(40), gallery, range(40))


def test_photo_difference_is_that_of_the_whole_picture():
    a = picture(6, 150, 70)
    rng = np.random.default_rng(7)
    b = np.clip(a.astype(int) + rng.integers(-9, 10, a.shape), 0, 255).astype(np.uint8)
    whole, strips = metrics.photo_difference(a, b, strip=1000), metrics.photo_difference(a, b, strip=40)
    assert whole.psnr == pytest.approx(metrics.psnr(a, b)) == strips.psnr
    assert whole.ssim == pytest.approx(metrics.ssim(a, b), abs=1e-6) == pytest.approx(strips.ssim, abs=1e-6)
    assert whole.flip == pytest.approx(metrics.flip(a, b), abs=1e-6) == pytest.approx(strips.flip, abs=1e-5)
    change = np.abs(a.astype(int) - b)
    assert strips.max_change == change.max() and strips.mean_change == pytest.approx(change.mean())
    same = metrics.photo_difference(a, a)
    assert same.psnr == math.inf and (same.flip, same.mean_change, same.max_change) == (0, 0, 0)
    with pytest.raises(ValueError, match="11 x 11"):
        metrics.photo_difference(a[:9], b[:9])
