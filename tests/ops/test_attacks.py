"""Each attack keeps its bound and improves its own loss, on real surrogates and a generated face."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from scol_ops.attack import momentum
from scol_ops.attacks import MIFGSMSettings, TIDIMSettings, TIPIMSettings, mi_fgsm, ti_dim, tip_im
from scol_ops.attacks.common import bounds
from scol_ops.attacks.ti_dim import diverse, gaussian_kernel
from scol_ops.attacks.tip_im import discrepancy, gain, identity_loss
from scol_ops.models.embedded import load_recogniser
from scol_ops.models.recognisers import ffhq_mean_geometry

EPS = 6 / 255


@pytest.fixture(scope="module")
def face(draw_face) -> torch.Tensor:
    return torch.from_numpy(draw_face(15)).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.fixture(scope="module")
def surrogates():
    geometry = ffhq_mean_geometry(1, 256)
    networks = [load_recogniser(name) for name in ("mobilefacenet", "dlib_resnet")]
    return [lambda x, n=n: n.embed_crops(x, *geometry) for n in networks]


@pytest.fixture(scope="module")
def targets(draw_face, surrogates):
    people = [torch.from_numpy(draw_face(s)).permute(2, 0, 1)[None].float() / 127.5 - 1 for s in (2, 10, 13)]
    with torch.no_grad():
        return [torch.cat([f(p) for p in people]) for f in surrogates]


def run(name: str, face, surrogates, targets, mask=None, **changes):
    small = {"eps": EPS, "steps": 4} | changes
    if name == "mi_fgsm":
        return mi_fgsm(face, surrogates, MIFGSMSettings(**small), mask)
    if name == "ti_dim":
        return ti_dim(face, surrogates, TIDIMSettings(**small), mask, seed=1)
    return tip_im(face, surrogates, targets, TIPIMSettings(**small), mask, seed=1)


@pytest.mark.parametrize("name", ["mi_fgsm", "ti_dim", "tip_im"])
def test_bound_and_loss(name, face, surrogates, targets):
    mask = torch.zeros(1, 1, 256, 256)
    mask[:, :, 60:220, 50:200] = 1
    mask[:, :, 100:140] *= 0.5
    result = run(name, face, surrogates, targets, mask)
    change = (result.picture - face).abs()
    assert float((change - 2 * EPS * mask).max()) < 1e-6 and float(change.max()) > 1.5 * EPS
    assert float(result.picture.abs().max()) <= 1
    assert not change[:, :, :60].any() and not change[..., 200:].any()
    assert result.loss_before.shape == result.loss_after.shape == (1,)
    assert float(result.loss_after) < float(result.loss_before) - 0.1
    if name != "tip_im":
        assert float(result.loss_before) == pytest.approx(1, abs=1e-5)  # the cosine to itself
    again = run(name, face, surrogates, targets, mask)
    assert torch.equal(result.picture, again.picture)


@pytest.mark.parametrize("name", ["mi_fgsm", "ti_dim", "tip_im"])
def test_refusals(name, face, surrogates, targets):
    for wrong in ((face[0], surrogates, targets), (face, [], []), (face[:, :1], surrogates, targets)):
        with pytest.raises(ValueError):
            run(name, *wrong)
    with pytest.raises(ValueError):
        run(name, face, surrogates, targets, eps=-0.1)
    if name == "tip_im":
        for bad in (targets[:1], [targets[0], targets[1][:2]], [t[:0] for t in targets]):
            with pytest.raises(ValueError, match="targets"):
                run(name, face, surrogates, bad)
        with pytest.raises(ValueError, match="one face"):
            run(name, face.repeat(2, 1, 1, 1), surrogates, targets)


def test_without_momentum_one_step_is_fgsm(face, surrogates):
    """A signed step of the loss's own gradient, from the start that the attacks share."""
    x = face.clone().requires_grad_(True)
    flat = lambda p: torch.nn.functional.normalize(p.flatten(1), dim=1)  # noqa: E731
    result = mi_fgsm(face, [flat], MIFGSMSettings(eps=EPS, steps=1, decay=0.0))
    low, high = bounds(face, EPS, None)
    y, c = np.mgrid[:256, :256]
    start = (face + torch.from_numpy(((y + c) % 2 * 2 - 1) / 255).float()).clamp(low, high).requires_grad_(True)
    (flat(start) * flat(face)).sum().backward()
    assert torch.equal(result.picture, (start.detach() - 2 * EPS * start.grad.sign()).clamp(low, high))
    assert x.grad is None


@pytest.fixture
def linear() -> tuple[torch.Tensor, np.ndarray]:
    """A small picture, and the matrix (D, 3 * 24 * 24) of a feature that is linear but for its length."""
    rng = np.random.default_rng(5)
    matrix = rng.standard_normal((6, 3 * 24 * 24)) / 40
    return torch.from_numpy(rng.uniform(-0.5, 0.5, (1, 3, 24, 24))), matrix


def gradient_by_hand(pixels: np.ndarray, matrix: np.ndarray, toward: np.ndarray) -> np.ndarray:
    """Of the cosine of a linear feature to a unit vector."""
    v = matrix @ pixels.ravel()
    length = np.linalg.norm(v)
    return (matrix.T @ ((toward - v * (v @ toward) / length**2) / length)).reshape(pixels.shape)


@pytest.mark.parametrize("blur", [False, True])
def test_two_steps_by_hand(linear, blur):
    """What a step leaves is carried to the next; TI-DIM smooths each gradient first, with zeros around it."""
    x, matrix = linear
    weights = torch.from_numpy(matrix)
    feature = lambda p: torch.nn.functional.normalize(p.flatten(1) @ weights.T, dim=1)  # noqa: E731
    eps, step = 0.05, 0.02
    if blur:
        settings = TIDIMSettings(eps=eps, steps=2, step_size=step, probability=0.0, kernel=5, sigma=1.5)
        got = ti_dim(x, [feature], settings).picture.numpy()
    else:
        got = mi_fgsm(x, [feature], MIFGSMSettings(eps=eps, steps=2, step_size=step)).picture.numpy()
    g = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 1.5**2))
    kernel = np.outer(g, g) / g.sum() ** 2
    start = x.numpy()
    own = matrix @ start.ravel() / np.linalg.norm(matrix @ start.ravel())
    y, c = np.mgrid[:24, :24]
    moved, carried, plain = start + ((y + c) % 2 * 2 - 1) / 255, np.zeros_like(start), []
    for _ in range(2):
        gradient = gradient_by_hand(moved, matrix, own)
        if blur:
            gradient = np.stack([ndimage.convolve(g, kernel, mode="constant") for g in gradient[0]])[None]
        carried = carried + gradient / np.abs(gradient).mean()
        plain.append(np.sign(gradient))
        moved = np.clip(moved - 2 * step * np.sign(carried), start - 2 * eps, start + 2 * eps)
    assert (np.abs(got - moved) < 1e-6).mean() > 0.999  # signs of what is nearly zero may differ
    assert (np.sign(carried) != plain[1]).mean() > 0.01  # without what was carried it would be another picture


def test_diverse_inputs_come_as_often_as_they_should(linear):
    x, matrix = linear
    weights = torch.from_numpy(matrix)
    grey = []

    def feature(p):
        grey.append(bool((p == 0).all(dim=1).any()))  # the padding of a shrunk picture
        return torch.nn.functional.normalize(p.flatten(1) @ weights.T, dim=1)

    ti_dim(x, [feature], TIDIMSettings(eps=0.01, steps=200, probability=0.3, smallest=0.7), seed=2)
    steps = grey[1:-2]  # first the original; at the end the losses of both pictures as they are
    assert len(steps) == 200 and 0.2 < np.mean(steps) < 0.4 and not grey[0] and not any(grey[-2:])


def test_tip_im_takes_the_target_that_gains_most(linear):
    x, matrix = linear
    weights = torch.from_numpy(matrix)
    feature = lambda p: torch.nn.functional.normalize(p.flatten(1) @ weights.T, dim=1)  # noqa: E731
    own = feature(x)
    torch.manual_seed(1)
    near, far = (torch.nn.functional.normalize(t, dim=1) for t in (own + 0.8 * torch.randn(1, 6), -own))
    settings = TIPIMSettings(eps=0.05, steps=1, diversity=0.0)
    both = tip_im(x, [feature], [torch.cat([far, near])], settings)
    alone = {name: tip_im(x, [feature], [t], settings).picture for name, t in (("near", near), ("far", far))}
    gains = {n: float(gain([feature(p)], [own], [torch.cat([far, near])])) for n, p in alone.items()}
    best = max(gains, key=gains.get)
    assert torch.equal(both.picture, alone[best]) and not torch.equal(alone["near"], alone["far"])
    assert abs(gains["near"] - gains["far"]) > 1e-4


def test_momentum_by_hand():
    g = torch.tensor([1.0, -3.0]).reshape(1, 1, 1, 2)
    assert momentum(torch.ones_like(g), g, 0.5).flatten().tolist() == [1.0, -1.0]


def test_translation_kernel_and_diverse_inputs():
    kernel = gaussian_kernel(5, 1.5)
    assert float(kernel.sum()) == pytest.approx(1) and torch.equal(kernel, kernel.T) and kernel.argmax() == 12
    assert float(kernel[2, 4] / kernel[2, 2]) == pytest.approx(np.exp(-4 / (2 * 1.5**2)))
    with pytest.raises(ValueError):
        gaussian_kernel(4, 1)
    x = torch.ones(1, 3, 40, 40)
    seen = diverse(x, torch.Generator().manual_seed(0), 0.5)
    inside = seen[0, 0] > 0.5
    assert seen.shape == x.shape and 400 <= int(inside.sum()) < 1600 and int((seen == 0).sum()) > 0
    assert torch.equal(diverse(x, torch.Generator().manual_seed(0), 1.0), x)


def test_tip_im_parts_by_hand():
    o, t = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert identity_loss([o], [o], [t[:1]]).tolist() == [2.0]  # squared distances 2 and 0
    assert identity_loss([t[:1]], [o], [t[:1]]).tolist() == [-2.0]
    expected = np.log1p(np.exp(0 - np.sqrt(2)) + np.exp(0 - 2))
    assert gain([o], [o], [t]).item() == pytest.approx(expected, rel=1e-5)
    assert gain([t[:1]], [o], [t]) > gain([o], [o], [t])
    a = torch.zeros(2, 3, 4, 4)
    assert discrepancy(a, a).item() == pytest.approx(0) and discrepancy(a, a + 1).item() == pytest.approx(
        2 - 2 * np.exp(-0.5)
    )


def test_naturalness_pulls_back(face, surrogates, targets):
    free, held = (run("tip_im", face, surrogates[:1], targets[:1], gamma=g, steps=6) for g in (0.0, 3000.0))
    assert float((held.picture - face).square().mean()) < float((free.picture - face).square().mean())
