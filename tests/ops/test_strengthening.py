"""The closed loop's rules."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scol_ops.metrics import psnr, to_uint8
from scol_ops.strengthening import (
    Bars,
    Seen,
    StrengthenSettings,
    attack_of,
    best_round,
    faded,
    margins_of,
    refinement_of,
    unconfined,
)  # fmt: skip
from scol_ops.tuning import confine
from tests.helpers import operator_settings
from tests.helpers.operator_settings import ATTACK

SETTINGS = StrengthenSettings(
    rounds=3, steps=50, hinge_factor=2.0, margin_step=0.2, visible_factor=4.0, eps_factor=2.0, max_eps=0.05, min_psnr=34.0
)
REFINE = replace(
    operator_settings.REFINE,
    steps=80, lr=0.02, start=0.4, l2_weight=8.0, ssim_weight=4.0, visible_weight=16.0, flip_weight=8.0, flip_target=0.01,
    hinge=0.5, blur=True, limit=0.3,
)  # fmt: skip


def test_a_round_is_stronger_by_its_factors_and_otherwise_the_same() -> None:
    first, third = (refinement_of(SETTINGS, REFINE, n) for n in (1, 3))
    assert (first.steps, first.start, first.hinge) == (50, 1.0, 1.0)
    assert (first.l2_weight, first.ssim_weight, first.visible_weight) == (2.0, 1.0, 4.0)
    assert (first.flip_weight, first.flip_target) == (2.0, 0.04)
    assert (third.hinge, third.l2_weight, third.visible_weight) == (4.0, 8 / 64, 16 / 64)
    moved = {"steps", "start", "hinge", "l2_weight", "ssim_weight", "visible_weight", "flip_weight", "flip_target"}
    assert all(asdict(first)[name] == value for name, value in asdict(REFINE).items() if name not in moved)
    assert margins_of(SETTINGS, (0.5, -0.5), 2) == pytest.approx((0.1, -0.9))
    assert margins_of(SETTINGS, (0.5, -0.5), 3)[1] == -1.0
    with pytest.raises(ValueError, match="counted from 1"):
        refinement_of(SETTINGS, REFINE, 0)


def test_the_bound_of_the_attack_grows_up_to_its_limit_and_never_falls() -> None:
    base = replace(ATTACK, eps=0.01, step_size=0.002, steps=7)
    found = [attack_of(SETTINGS, base, n) for n in (1, 2, 3)]
    assert [s.eps for s in found] == pytest.approx([0.02, 0.04, 0.05]) and {s.steps for s in found} == {7}
    assert [s.step_size for s in found] == pytest.approx([0.004, 0.008, 0.01]), "it still reaches the bound"
    assert attack_of(SETTINGS, replace(ATTACK, eps=0.2), 1).eps == 0.2, "the attack's own bound is above the limit"
    assert attack_of(SETTINGS, replace(ATTACK, eps=0.0), 2).eps == 0.0


def test_refining_again_does_not_fade_the_change_out_twice() -> None:
    rng = torch.Generator().manual_seed(0)
    original = torch.rand(1, 3, 24, 24, generator=rng) - 0.5
    change = (torch.rand(1, 3, 24, 24, generator=rng) - 0.5) / 2
    mask = torch.linspace(0, 1, 24).view(1, 1, 1, 24).expand(1, 1, 24, 24)
    once = confine(original + change, original, mask)
    again = confine(unconfined(once, original, mask), original, mask)
    inside = (mask >= 0.1).expand_as(once)
    assert torch.allclose(again[inside], once[inside], atol=1e-6)
    assert torch.all((again - original).abs() <= (once - original).abs() + 1e-6)


def test_a_face_is_held_to_the_bar_of_each_transformation() -> None:
    bars = Bars(saved=0.3, distorted=0.5)
    face = Seen({"none": 0.35, "jpeg75+half": 0.45, "blur1": 0.2})
    assert face.saved == 0.35 and face.worst == "jpeg75+half"
    assert face.above(bars) == "none" and face.excess(bars) == pytest.approx(0.05)
    assert face.above(Bars(0.4, 0.4)) == "jpeg75+half" and face.above(Bars(0.4, 0.5)) is None
    assert Seen({"none": 0.3}).above(bars) is None, "at its bar a face passes"


def test_the_first_round_that_passes_is_kept_else_the_nearest() -> None:
    bars = Bars(0.3, 0.4)
    rounds = [Seen({"none": s, "half": d}) for s, d in ((0.6, 0.7), (0.2, 0.45), (0.29, 0.39), (0.1, 0.1))]
    assert best_round(rounds, bars) == 2
    assert best_round(rounds[:2], bars) == 1
    worse = [Seen({"none": 0.5}), Seen({"none": 0.4}), Seen({"none": 0.45}), Seen({"none": 0.4})]
    assert best_round(worse, bars) == 1, "of equal ones the earlier, which changes less"
    with pytest.raises(ValueError):
        best_round([], bars)


COSINES = st.integers(-64, 64).map(lambda n: n / 64)


@given(st.lists(st.tuples(COSINES, COSINES), min_size=1, max_size=6), COSINES)
def test_never_a_round_worse_than_another(pairs: list[tuple[float, float]], bar: float) -> None:
    bars, rounds = Bars(bar, bar), [Seen({"none": s, "half": d}) for s, d in pairs]
    chosen = rounds[best_round(rounds, bars)]
    passed = any(one.above(bars) is None for one in rounds)
    assert (chosen.above(bars) is None) == passed
    assert passed or max(chosen.cosines.values()) == min(max(one.cosines.values()) for one in rounds)


def test_fading_reaches_the_quality_asked_for():
    rng = torch.Generator().manual_seed(0)
    original = torch.rand(1, 3, 32, 32, generator=rng) * 1.6 - 0.8
    picture = original + 0.2 * torch.randn(original.shape, generator=rng).clamp(-1, 1)

    def quality(x):
        return psnr(to_uint8(original[0]), to_uint8(x[0]))

    result = faded(picture, original, quality(picture), 34.0)
    assert quality(picture) < 30 and quality(result) == pytest.approx(34, abs=0.05)
    share = (result - original) / (picture - original)
    assert float(share.max() - share.min()) < 1e-2, "the same of every pixel's change"
    with pytest.raises(ValueError, match="not below"):
        faded(picture, original, 34.0, 34.0)
