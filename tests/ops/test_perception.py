"""Perceived colours against FLIP itself, where FLIP has no edges to add, and against the filters' closed form."""

import math

import flip_evaluator
import numpy as np
import pytest
import torch

from scol_ops.perception import PIXELS_PER_DEGREE, colour_flip, opponent_colours, perceived_colours, visible_difference


def flat(colour):
    return (torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 32, 32) * 2 - 1).float()


def flip_of_flat(a, b):
    return float(flip_evaluator.evaluate(a, b, "LDR", inputsRGB=True, applyMagma=False)[1])


def hyab(a, b):
    d = (a - b)[0, :, 16, 16]
    return float(d[0].abs() + d[1:].norm())


@pytest.mark.parametrize("first, second", [((0.8, 0.5, 0.4), (0.75, 0.55, 0.4)), ((0.1, 0.1, 0.1), (0.12, 0.1, 0.16)), ((1, 1, 1), (0.9, 0.9, 0.95))])
def test_flat_colours_differ_as_flip_says(first, second):
    # FLIP of flat pictures is HyAB^0.7, rescaled so that the largest (green to blue) is 1, bent at 0.4 of it to 0.95.
    far = hyab(perceived_colours(flat((0.0, 1.0, 0.0))), perceived_colours(flat((0.0, 0.0, 1.0)))) ** 0.7
    mine = hyab(perceived_colours(flat(first)), perceived_colours(flat(second))) ** 0.7
    assert mine < 0.4 * far
    pictures = [np.full((32, 32, 3), c, np.float32) for c in (first, second)]
    assert mine / (0.4 * far) * 0.95 == pytest.approx(flip_of_flat(*pictures), rel=2e-3)


@pytest.mark.parametrize("cycles", [4.0, 16.0])
def test_fine_patterns_fade_as_the_eye_does(cycles):
    """A grating of f cycles a degree keeps exp(-b f^2) of its lightness: the Gaussian's transform (b = 0.0047)."""
    x = torch.arange(256) / PIXELS_PER_DEGREE
    light = 0.5 + 0.05 * torch.sin(2 * math.pi * cycles * x)
    value = (1.055 * light ** (1 / 2.4) - 0.055) * 2 - 1
    picture = value.expand(1, 3, 64, 256)
    seen = ((perceived_colours(picture)[0, 0, 32] + 16) / 116) ** 3
    middle = seen[40:216]
    amplitude = float(middle.max() - middle.min()) / 2
    assert amplitude == pytest.approx(0.05 * math.exp(-0.0047 * cycles**2), rel=0.03)
    assert opponent_colours(picture)[0, 1:].abs().max() < 0.02  # grey has no colour


def test_visible_difference_is_zero_at_equality_with_a_finite_gradient():
    picture = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted = perceived_colours(picture)
    picture.requires_grad_(True)
    loss = visible_difference(perceived_colours(picture), wanted)
    loss.backward()
    assert float(loss.detach()) == 0 and torch.isfinite(picture.grad).all() and picture.grad.abs().max() == 0
    fine = (torch.arange(40) % 2 * 0.2 - 0.1).expand(1, 3, 40, 40)
    with torch.no_grad():
        coarse_loss, fine_loss = (visible_difference(perceived_colours(picture * 0.5 + d), perceived_colours(picture * 0.5)) for d in (0.1, fine))
    assert fine_loss < 0.05 * coarse_loss


def test_wrong_input():
    with pytest.raises(ValueError, match="pictures must be"):
        perceived_colours(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="positive"):
        perceived_colours(torch.zeros(1, 3, 8, 8), 0)


@pytest.mark.parametrize("first, second", [((0.8, 0.5, 0.4), (0.75, 0.55, 0.4)), ((0, 1, 0), (0, 0, 1)), ((0.9, 0.1, 0.1), (0.1, 0.1, 0.9))])
def test_colour_flip_of_flat_pictures_is_flip(first, second):
    mine = colour_flip(perceived_colours(flat(first)), perceived_colours(flat(second)))[0, 16, 16]
    pictures = [np.full((32, 32, 3), c, np.float32) for c in (first, second)]
    assert float(mine) == pytest.approx(flip_of_flat(*pictures), rel=3e-3)


def test_colour_flip_prefers_few_places_to_many():
    """The same squared change in one place shows less than spread; a squared loss cannot tell them apart."""
    grey = torch.zeros(1, 3, 96, 96)
    spot, spread = grey.clone(), grey.clone()
    spot[..., 32:64, 32:64] += 0.3
    spread += 0.1
    wanted = perceived_colours(grey)
    of_spot, of_spread = (float(colour_flip(perceived_colours(p), wanted).mean()) for p in (spot, spread))
    assert of_spot < 0.5 * of_spread
    assert (spot - grey).square().sum() == pytest.approx(float((spread - grey).square().sum()), rel=1e-5)


def test_colour_flip_has_a_finite_gradient_at_equality():
    picture = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted = perceived_colours(picture)
    picture.requires_grad_(True)
    loss = colour_flip(perceived_colours(picture), wanted)
    assert loss.shape == (1, 40, 40) and float(loss.detach().max()) < 0.002
    loss.sum().backward()
    assert torch.isfinite(picture.grad).all()
