import pytest
import torch

from scol_ops.inspection import PAPER_TAU, inspect_components


@pytest.fixture
def pair():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 16, generator=rng) * 2, torch.randn(3, 4, 16, generator=rng) * 2


def test_by_hand():
    w = torch.tensor([[[0.0, 1.0, -1.0, 2.0]]])
    w_inv = torch.tensor([[[3.0, 4.5, -4.0, 2.0]]])
    found = inspect_components(w, w_inv)
    assert found.mask.tolist() == [[[True, False, True, True]]]  # 3 is not above tau = 3
    assert found.target.tolist() == [[[3.0, 1.0, -4.0, 2.0]]]
    assert found.share.tolist() == [0.75]
    assert (found.tau, found.unit) == (PAPER_TAU, "absolute") == (3.0, "absolute")


def test_std_by_hand():
    w = torch.zeros(1, 2, 3)
    w_inv = torch.tensor([[[1.0, 1.0, 1.0], [2.0, -2.0, 2.0]]])
    per_component = torch.tensor([0.5, 1.0, 2.0])
    found = inspect_components(w, w_inv, 1.0, unit="std", std=per_component)
    assert found.mask.tolist() == [[[False, True, True], [False, False, True]]]
    per_layer = torch.stack((per_component, per_component.flip(0)))
    found = inspect_components(w, w_inv, 1.0, unit="std", std=per_layer)
    assert found.mask.tolist() == [[[False, True, True], [True, False, False]]]
    assert found.unit == "std"
    torch.testing.assert_close(found.share, torch.tensor([0.5]))


def test_target_is_one_of_the_two_and_the_loss_sees_only_the_mask(pair):
    w, w_inv = pair
    found = inspect_components(w, w_inv, 1.5)
    assert found.mask.any() and not found.mask.all()
    assert torch.equal(found.target[found.mask], w_inv[found.mask])
    assert torch.equal(found.target[~found.mask], w[~found.mask])
    assert torch.equal(found.mask * (found.target - w), found.target - w)
    assert ((found.target - w).abs() <= 1.5).all()


def test_a_higher_tau_never_takes_a_component_away(pair):
    shares = []
    before = torch.zeros(3, 4, 16, dtype=torch.bool)
    for tau in (0.0, 0.5, 1.0, 3.0, 10.0, float("inf")):
        found = inspect_components(*pair, tau)
        assert not (before & ~found.mask).any()
        before = found.mask
        shares.append(found.share.mean().item())
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1 and len(set(shares)) > 4


def test_each_face_alone(pair):
    together = inspect_components(*pair, 1.0)
    for b in range(3):
        alone = inspect_components(pair[0][b : b + 1], pair[1][b : b + 1], 1.0)
        assert torch.equal(alone.target[0], together.target[b]) and alone.share[0] == together.share[b]


def test_equal_codes_and_empty_batch(pair):
    found = inspect_components(pair[0], pair[0], 0.0)
    assert found.mask.all() and torch.equal(found.target, pair[0])
    empty = inspect_components(pair[0][:0], pair[1][:0])
    assert empty.mask.shape == (0, 4, 16) and empty.share.shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -1.0}, "tau"),
        ({"tau": float("nan")}, "tau"),
        ({"unit": "percent"}, "unit"),
        ({"unit": "std"}, "std is needed"),
        ({"std": torch.ones(16)}, "only for it"),
        ({"unit": "std", "std": torch.ones(4)}, "std must be"),
        ({"unit": "std", "std": torch.zeros(16)}, "not positive"),
        ({"unit": "std", "std": torch.full((4, 16), float("nan"))}, "not positive"),
    ],
)
def test_malformed_options(pair, options, message):
    with pytest.raises(ValueError, match=message):
        inspect_components(*pair, **options)


def test_malformed_codes(pair):
    w, w_inv = pair
    with pytest.raises(ValueError, match="both be"):
        inspect_components(w, w_inv[:, :3])
    with pytest.raises(ValueError, match="both be"):
        inspect_components(w[0], w_inv[0])
    w_inv[2, 1, 0] = float("inf")
    with pytest.raises(ValueError, match="w_inv: face 2, layer 1"):
        inspect_components(w, w_inv)
