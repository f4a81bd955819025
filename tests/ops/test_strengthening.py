"""The closed loop's rules."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from scol_ops.strengthening import (
    Bars,
    Look,
    Search,
    Seen,
    StrengthenSettings,
    faded,
    refinement_of,
    unconfined,
)  # fmt: skip
from scol_ops.tuning import confine
from tests.helpers import operator_settings

SETTINGS = StrengthenSettings(rounds=3, steps=50, seen_factor=4.0, looks=4)
REFINE = replace(operator_settings.REFINE, steps=80, lr=0.02, start=0.4, seen=8.0, hinge=0.5, blur=True, limit=0.3)


def test_a_round_is_stronger_by_its_factor_and_otherwise_the_same() -> None:
    first, third = (refinement_of(SETTINGS, REFINE, n) for n in (1, 3))
    assert (first.steps, first.start, first.seen) == (50, 1.0, 2.0)
    assert (third.steps, third.start, third.seen) == (50, 1.0, 8 / 64)
    moved = {"steps", "start", "seen"}
    for found in (first, third):
        assert all(asdict(found)[name] == value for name, value in asdict(REFINE).items() if name not in moved)
    with pytest.raises(ValueError, match="counted from 1"):
        refinement_of(SETTINGS, REFINE, 0)


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


def test_a_share_of_a_change() -> None:
    rng = torch.Generator().manual_seed(0)
    original, picture = (torch.rand(1, 3, 8, 8, generator=rng) * 2 - 1 for _ in range(2))
    assert torch.equal(faded(picture, original, 0), original)
    assert torch.allclose(faded(picture, original, 1), picture, atol=1e-6)
    assert torch.allclose(faded(picture, original, 0.25) - original, (picture - original) / 4, atol=1e-6)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="a share is"):
            faded(picture, original, wrong)


def test_a_face_is_held_to_the_bar_of_each_transformation() -> None:
    bars = Bars(saved=0.3, distorted=0.5)
    face = Seen({"none": 0.35, "jpeg75+half": 0.45, "blur1": 0.2})
    assert face.saved == 0.35 and face.worst == "jpeg75+half"
    assert face.above(bars) == "none" and face.excess(bars) == pytest.approx(0.05)
    assert face.above(Bars(0.4, 0.4)) == "jpeg75+half" and face.above(Bars(0.4, 0.5)) is None
    assert Seen({"none": 0.3}).above(bars) is None, "at its bar a face passes"


# ---- the search ------------------------------------------------------------------------------------------------------


def searched(most: int, hidden, unseen) -> Search:
    """A search of a face: functions of the share."""
    search = Search(most)
    for _ in range(most + 1):
        share = search.next()
        if share is None:
            break
        assert 0 < share <= 1 and share not in [look.share for look in search.looks], "no file is made twice"
        search.told(Look(share, hidden(share), unseen(share)))
    assert search.next() is None and len(search.looks) <= most + 1
    return search


def kept(search: Search) -> Look:
    return search.looks[search.found]


SHARES = st.integers(1, 1100).map(lambda n: n / 1000)


@given(st.integers(0, 8), SHARES, SHARES)
@example(4, 0.3, 1.1)
@example(4, 0.9, 0.1)
@example(8, 0.501, 0.5)
@example(3, 1.1, 0.01)
def test_the_smallest_share_that_hides_or_the_largest_that_may_be_seen(most: int, hides: float, shows: float) -> None:
    """A face that is hidden from one share on, and shows too much from another on."""
    search = searched(most, lambda share: share >= hides, lambda share: share < shows)
    found, width = kept(search), 2.0**-most
    assert found in search.looks and search.looks[0].share == 1
    if hides > 1 and shows > 1:  # the whole does not hide: a round is due, no share
        assert len(search.looks) == 1 and found.share == 1
    elif found.hidden and found.unseen:
        assert hides <= found.share <= hides + width
    elif hides < shows:
        assert shows - hides <= width, "both bars can be met, but by shares that lie closer than it looks"
        assert found.unseen or shows <= width
    elif found.unseen:
        assert shows - width <= found.share < shows, "sight wins"
    else:
        assert shows <= width and found.share == min(look.share for look in search.looks)


@given(st.integers(0, 10), st.lists(st.tuples(st.booleans(), st.booleans()), min_size=11, max_size=11))
def test_looks_that_contradict_each_other_end_as_well(most: int, answers: list[tuple[bool, bool]]) -> None:
    told = iter(answers)
    search = Search(most)
    while (share := search.next()) is not None:
        assert 0 < share <= 1
        search.told(Look(share, *next(told)))
    found, looks = kept(search), search.looks
    assert len(looks) <= most + 1 and found in looks
    both = [look.share for look in looks if look.hidden and look.unseen]
    if both:
        assert found.share == min(both) and found.hidden and found.unseen
    elif any(look.unseen for look in looks):
        assert found.unseen and found.share == max(look.share for look in looks if look.unseen)
    else:
        assert found.share == min(look.share for look in looks)


def test_a_search_by_hand() -> None:
    search = searched(4, lambda share: share >= 0.3, lambda share: True)
    assert [look.share for look in search.looks] == [1, 0.5, 0.25, 0.375, 0.3125] and kept(search).share == 0.3125
    # Hidden from 0.6 on, too much from 0.4 on: at 0.5 it is known that no share does both.
    search = searched(4, lambda share: share >= 0.6, lambda share: share < 0.4)
    assert [look.share for look in search.looks] == [1, 0.5, 0.25, 0.375, 0.4375] and kept(search).share == 0.375
    assert kept(search).unseen and not kept(search).hidden
    assert kept(searched(0, lambda share: True, lambda share: False)).share == 1, "it may not look for less"
    with pytest.raises(ValueError, match="no looks"):
        _ = Search(3).found
