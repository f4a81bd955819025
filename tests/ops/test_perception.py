"""What an eye sees of a change: the rules that the refinement leans on, and how it ranks beside ColorVideoVDP
itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from scol_ops.perception import PIXELS_PER_DEGREE, VisibleDifference, opponent_light
from scol_ops.visibility import jod

SIZE = 96


def noise(seed: int, size: int = SIZE) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """Shading, with texture on its right half; no pixel near black or white."""
    y, x = torch.meshgrid(*[torch.linspace(0, 1, SIZE)] * 2, indexing="ij")
    shading = torch.stack([0.3 * torch.sin(3 * x + 2 * y + c) for c in range(3)])[None]
    return shading + 0.15 * noise(0).clamp(-2, 2) * (x > 0.5)


def test_equal_pictures_show_nothing_and_have_a_finite_gradient(picture):
    same = picture.clone().requires_grad_(True)
    seen = VisibleDifference(picture)(same)
    assert seen.shape == (1,) and 0 <= float(seen.detach()) < 1e-3
    seen.sum().backward()
    assert torch.isfinite(same.grad).all() and float(same.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["noise", "shift", "colour", "ripple"])
def test_more_change_is_seen_more(picture, kind):
    change = {
        "noise": noise(1),
        "shift": torch.ones(1, 3, SIZE, SIZE),
        "colour": torch.tensor([1.0, -0.3, 0.2]).view(1, 3, 1, 1).expand(1, 3, SIZE, SIZE),
        "ripple": torch.sin(torch.arange(SIZE) / 2).expand(1, 3, SIZE, SIZE),
    }[kind]
    visible = VisibleDifference(picture)
    found = [float(visible(picture + amount * change)) for amount in (0, 0.01, 0.02, 0.05, 0.1, 0.2)]
    assert all(less < more for less, more in zip(found, found[1:], strict=False)), found
    assert found[0] < 1e-3 and found[-1] > 0.3


def test_texture_hides_what_smooth_skin_shows():
    flat, change = torch.zeros(1, 3, SIZE, SIZE), 0.05 * noise(3)
    seen = [float(VisibleDifference(p)(p + change)) for p in (flat, 0.2 * noise(2).clamp(-2, 2))]
    assert seen[1] < 0.5 * seen[0], seen
    # It is the original that masks: a change does not hide itself.
    twice = [float(VisibleDifference(flat)(flat + n * change)) for n in (1, 2)]
    assert twice[1] > 1.5 * twice[0]


def test_fine_change_is_seen_from_near(picture):
    change = 0.05 * noise(4)
    far, usual, near = (float(VisibleDifference(picture, ppd)(picture + change)) for ppd in (80, PIXELS_PER_DEGREE, 20))
    assert far < 0.8 * usual and usual < 0.8 * near, (far, usual, near)


def test_only_what_is_looked_at_counts(picture):
    left, right = torch.zeros(1, 1, SIZE, SIZE), torch.zeros(1, 1, SIZE, SIZE)
    left[..., : SIZE // 3], right[..., -SIZE // 3 :] = 1, 1
    changed = picture + 0.1 * noise(5) * left
    there, everywhere, elsewhere = (
        float(VisibleDifference(picture, weight=w)(changed)) for w in (left, None, right)
    )
    assert elsewhere < 0.1 * everywhere < everywhere < there, (there, everywhere, elsewhere)
    # Weights are relative.
    assert float(VisibleDifference(picture, weight=3 * left)(changed)) == pytest.approx(there, rel=1e-5)


def test_each_picture_of_a_batch_is_judged_alone(picture):
    originals = torch.cat([picture, picture.flip(3) * 0.8])
    pictures = originals + 0.05 * torch.cat([noise(6), 2 * noise(7)])
    together = VisibleDifference(originals)(pictures)
    alone = [float(VisibleDifference(originals[i : i + 1])(pictures[i : i + 1])) for i in (0, 1)]
    assert together.tolist() == pytest.approx(alone, rel=1e-4) and alone[0] != pytest.approx(alone[1], rel=0.05)


def test_the_gradient_is_the_slope(picture):
    exact = picture.double()
    visible, direction = VisibleDifference(exact), noise(8).double()
    at = (exact + 0.05 * noise(9).double()).requires_grad_(True)
    (gradient,) = torch.autograd.grad(visible(at).sum(), at)
    step = 1e-5
    with torch.no_grad():
        slope = float(visible(at + step * direction) - visible(at - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_light_of_the_display():
    """White is 200 cd/m^2 and what the screen reflects; grey has next to no colour; beyond white is white."""
    white = opponent_light(torch.ones(1, 3, 2, 2))[0, :, 0, 0]
    black = opponent_light(-torch.ones(1, 3, 2, 2))[0, :, 0, 0]
    assert float(white[0] / black[0]) == pytest.approx(200.398 / 0.598, rel=1e-4)
    grey = opponent_light(torch.zeros(1, 3, 2, 2))[0, :, 0, 0]
    assert float(grey[1:].abs().max() / grey[0]) < 0.02
    red, blue = (
        opponent_light(torch.tensor(c).view(1, 3, 1, 1) * 2 - 1)[0, :, 0, 0] for c in ((1.0, 0, 0), (0, 0, 1.0))
    )
    assert red[1] > 0 > blue[1] and blue[2] > 0 > red[2]
    assert torch.equal(opponent_light(torch.full((1, 3, 2, 2), 1.5))[0, :, 0, 0], white)


def example(rng: np.random.Generator, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """A picture of smooth shading with some texture, and the same with a change: noise, ripples, a spot, another
    colour, or blocks, faint or strong."""
    y, x = np.mgrid[:size, :size]
    turn = 2 * np.pi * rng.random((3, 3))
    base = np.stack([0.3 + 0.4 * rng.random() + 0.2 * np.sin((a * x + b * y) / size + c) for a, b, c in turn], -1)
    grain = rng.normal(0, 1, (size // 2, size // 2, 1)).repeat(2, 0).repeat(2, 1) * (x > size / 2)[..., None]
    base = base + rng.choice([0, 0.02, 0.07]) * grain
    kind, colour = rng.integers(5), rng.normal(0, 1, 3)
    if kind == 0:
        change = rng.normal(0, 1, (size, size, 3))
    elif kind == 1:
        change = np.sin(2 * np.pi * x / rng.integers(3, 40))[..., None].repeat(3, -1)
    elif kind == 2:
        (cx, cy), r = rng.integers(20, size - 20, 2), rng.integers(4, 25)
        change = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * r**2))[..., None] * colour
    elif kind == 3:
        change = np.ones((size, size, 1)) * colour
    else:
        side = int(2 ** rng.integers(1, 5))
        change = np.kron(rng.normal(0, 1, (size // side, size // side, 3)), np.ones((side, side, 1)))
    before, after = base, base + 10 ** rng.uniform(-2.2, -0.9) * change
    return tuple((p.clip(0, 1) * 255).round().astype(np.uint8) for p in (before, after))


def test_it_ranks_changes_as_colorvideovdp_does():
    rng = np.random.default_rng(11)
    mine, theirs = [], []
    for _ in range(40):
        before, after = example(rng)
        original, changed = (torch.from_numpy(p).movedim(2, 0)[None].float() / 127.5 - 1 for p in (before, after))
        mine.append(float(VisibleDifference(original)(changed)))
        theirs.append(10 - jod(before, after))
    assert max(theirs) > 2 and min(theirs) < 0.2, "faint and strong ones are among them"
    assert spearmanr(mine, theirs).statistic > 0.95
    counted = [m / t for m, t in zip(mine, theirs, strict=True) if t > 0.1]
    assert 0.4 < math.exp(np.log(counted).mean()) < 1.6, "in JOD, too, it is of the same size"


def test_wrong_input(picture):
    for wrong in (picture[0], picture[:, :1], picture[..., :7]):
        with pytest.raises(ValueError, match="pictures must be"):
            VisibleDifference(wrong)
    with pytest.raises(ValueError, match="positive"):
        VisibleDifference(picture, 0)
    with pytest.raises(ValueError, match="nothing is looked at"):
        VisibleDifference(picture, weight=torch.zeros(1, 1, SIZE, SIZE))
