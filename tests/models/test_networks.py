"""Other layouts in memory, other precision, gradients: what a GPU would use, as far as a CPU can tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scol_ops import runtime
from scol_ops.models.e4e import E4E
from scol_ops.models.facenet import FaceNet
from scol_ops.models.ir import IRNetwork
from scol_ops.models.lpips_distance import LPIPSDistance
from scol_ops.models.recognisers import ffhq_mean_geometry
from scol_ops.models.stylegan2 import StyleGAN2
from scol_ops.tuning import PARAMETER_SETS, select_parameters
from scol_ops.warp import GeometryError
from tests.models.test_golden import OURS, checkpoints, family_of, filled, given, outputs_of, published, recipe


def golden(name: str):
    import json

    spec, (family, _) = json.loads((OURS / f"{name}.json").read_text()), family_of(name)
    inputs = given(spec)
    content = published(name, family, filled(spec), inputs)
    return family, checkpoints.load_public(family, checkpoints.read_checkpoint(content).value), spec, inputs


@pytest.mark.parametrize("name", ["stylegan2_64", "mobilefacenet"])
def test_channels_last_and_bfloat16(name: str) -> None:
    """Channels-last within the vectors' tolerance; bfloat16 autocast within 3 percent of the largest value."""
    family, loaded, spec, inputs = golden(name)
    expected = np.load(OURS / f"{name}.npz")

    def gaps() -> list[float]:
        found = outputs_of(family, loaded, spec, inputs)
        return [
            recipe.compare(recipe.pick(found[o["name"]].float().numpy(), s["how"]), expected[s["key"]])["rel_max"]
            for o in spec["outputs"]
            for s in o["stored"]
        ]

    with torch.autocast("cpu", torch.bfloat16):
        rough = gaps()
    assert max(rough) < 0.03
    runtime.channels_last(loaded.network)
    assert any(p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) for p in loaded.network.parameters())
    fine = gaps()
    assert max(fine) < 1e-5 < max(rough)


def test_generator_is_differentiable_and_its_parameters_can_be_chosen() -> None:
    network = StyleGAN2(64).eval()
    counts = {which: len(select_parameters(network, which)) for which in PARAMETER_SETS}
    assert counts["all"] > counts["convolutions"] > counts["late"] > 0
    select_parameters(network, "all")
    codes = torch.randn(1, 10, 512, requires_grad=True)
    network(codes).square().mean().backward()
    assert (codes.grad.abs().amax(dim=(0, 2)) > 0).all(), "a code that reaches no pixel"
    for name, parameter in network.named_parameters():
        # the noise strengths of a new network are 0, but their gradient is not
        assert (parameter.grad is None) == name.startswith("style."), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"codes must be \(B, 4, 512\)"):
        StyleGAN2(8)(torch.zeros(1, 10, 512))
    with pytest.raises(ValueError, match="power of two"):
        StyleGAN2(48)
    with pytest.raises(ValueError, match="e4e reads faces of 256 px"):
        E4E(8).eval()(torch.zeros(1, 3, 300, 300))
    with pytest.raises(ValueError, match="8 x 8, this network reads 49"):
        IRNetwork(50, True).eval()(torch.zeros(1, 3, 128, 128))


def test_lpips_is_the_packages_own() -> None:
    """The same numbers as the package's forward pass, at odd sizes too."""
    torch.manual_seed(0)
    for net in ("alex", "vgg"):
        network = LPIPSDistance(net).eval()
        a, b = torch.rand(2, 2, 3, 75, 101) * 2 - 1
        with torch.no_grad():
            expected, layers = network.package(a, b, retPerLayer=True)
            torch.testing.assert_close(network(a, b), expected.flatten(), rtol=1e-5, atol=1e-8)
            ours = network.per_layer(network.reference(a), b)
            torch.testing.assert_close(ours, torch.cat(layers, dim=1).flatten(1), rtol=1e-5, atol=1e-8)


def test_facenet_takes_mtcnns_box_stretched_to_a_square() -> None:
    network = FaceNet(None).eval()
    picture = torch.zeros(1, 3, 200, 200)
    picture[:, :, 40:140, 60:120] = 1.0  # what lies in the box, 60 wide and 100 high
    landmarks, boxes = ffhq_mean_geometry(1, 200)[0], torch.tensor([[59.5, 39.5, 119.5, 139.5]])
    aligned = network.align(picture, landmarks, boxes)
    inside = (aligned > 0.5)[0, 0]
    # the box takes 146 of the 160 px in both directions, and lies in the middle
    for axis in (0, 1):
        places = torch.nonzero(inside.any(dim=axis)).flatten()
        assert abs(len(places) - 146) <= 2 and abs(float(places.float().mean()) - 79.5) < 1
    with pytest.raises(GeometryError):
        network.align(picture, landmarks, torch.tensor([[10.0, 10.0, 10.0, 20.0]]))
    aligned.requires_grad_()
    embedding = network.embed_aligned(aligned)
    torch.testing.assert_close(F.normalize(embedding, dim=1), embedding)
    (embedding * torch.randn(512)).sum().backward()
    assert aligned.grad.abs().max() > 0
