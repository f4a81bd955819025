import math

import pytest
import torch

from scol_ops.fusion import fuse, fusion_weights


@pytest.fixture
def found():
    rng = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 4, 5, 8, generator=rng)
    scores = torch.rand(3, 4, 5, generator=rng).sort(dim=2, descending=True).values
    return vectors, scores, torch.randn(3, 4, 8, generator=rng)


def test_mean_by_hand():
    vectors = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    assert fuse(vectors, torch.tensor([[[0.9, 0.1]]])).tolist() == [[[2.0, 4.0]]]


def test_softmax_by_hand():
    vectors = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    scores = torch.tensor([[[0.7, 0.5]]])
    share = 1 / (1 + math.exp(-0.2 / 0.25))
    fused = fuse(vectors, scores, weighting="softmax", temperature=0.25)
    torch.testing.assert_close(fused, torch.tensor([[[share, 1 - share]]]))


def test_every_face_and_layer_on_its_own(found):
    vectors, scores, _ = found
    for weighting in ("mean", "softmax"):
        fused = fuse(vectors, scores, weighting=weighting)
        assert fused.shape == (3, 4, 8)
        for b in range(3):
            for layer in range(4):
                logits = [0.0] * 5 if weighting == "mean" else [s / 0.1 for s in scores[b, layer].tolist()]
                parts = [math.exp(v - max(logits)) for v in logits]
                expected = sum(p / sum(parts) * v for p, v in zip(parts, vectors[b, layer].double(), strict=True))
                torch.testing.assert_close(fused[b, layer].double(), expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(fuse(vectors[b : b + 1], scores[b : b + 1], weighting=weighting)[0], fused[b])


def test_temperature_goes_from_the_best_to_the_mean(found):
    vectors, scores, _ = found
    cold = fuse(vectors, scores, weighting="softmax", temperature=1e-4)
    hot = fuse(vectors, scores, weighting="softmax", temperature=1e6)
    torch.testing.assert_close(cold, vectors[:, :, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hot, vectors.mean(dim=2), rtol=1e-4, atol=1e-5)


def test_weights_sum_to_one():
    scores = torch.tensor([[300.0, -300.0, 0.0], [5.0, 5.0, 5.0]])
    for weighting in ("mean", "softmax"):
        weights = fusion_weights(scores, weighting, 0.1)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2))
        assert (weights >= 0).all()


def test_layers_keep_the_original(found):
    vectors, scores, original = found
    fused = fuse(vectors, scores)
    mixed = fuse(vectors, scores, layers=[3, 1], original=original)
    assert torch.equal(mixed[:, [1, 3]], fused[:, [1, 3]])
    assert torch.equal(mixed[:, [0, 2]], original[:, [0, 2]])
    assert torch.equal(fuse(vectors, scores, layers=range(4)), fused)
    assert torch.equal(fuse(vectors, scores, layers=[], original=original), original)


def test_gradient_reaches_the_codes(found):
    vectors = found[0].clone().requires_grad_()
    fuse(vectors, found[1]).sum().backward()
    torch.testing.assert_close(vectors.grad, torch.full_like(vectors, 0.2))


def test_empty_batch_and_one_code(found):
    vectors, scores, _ = found
    assert fuse(vectors[:0], scores[:0]).shape == (0, 4, 8)
    assert torch.equal(fuse(vectors[:, :, :1], scores[:, :, :1], weighting="softmax"), vectors[:, :, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "median"}, "weighting"),
        ({"weighting": "softmax", "temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"layers": [0, 4]}, r"0..3, got \[4\]"),
        ({"layers": [-1]}, r"0..3, got \[-1\]"),
        ({"layers": [0]}, "need the original"),
    ],
)
def test_malformed_options(found, options, message):
    with pytest.raises(ValueError, match=message):
        fuse(found[0], found[1], **options)


def test_malformed_codes(found):
    vectors, scores, original = found
    for wrong in (scores[:, :, :4], scores[0], scores[..., None]):
        with pytest.raises(ValueError, match="scores"):
            fuse(vectors, wrong)
    with pytest.raises(ValueError, match="at least one"):
        fuse(vectors[:, :, :0], scores[:, :, :0])
    with pytest.raises(ValueError, match="scores have"):
        fuse(vectors, scores.masked_fill(scores == scores[1, 2, 3], float("inf")))
    vectors[1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="face 1, layer 2"):
        fuse(vectors, scores)
    with pytest.raises(ValueError, match="need the original"):
        fuse(found[0].nan_to_num(), scores, layers=[0], original=original[:, :3])
