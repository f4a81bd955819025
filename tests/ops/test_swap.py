"""The swap oracle: which codes it replaces, what a mask keeps, and that a swap shows the source."""

from __future__ import annotations

import pytest
import torch

from scol_ops.models import files
from scol_ops.models.embedded import load_mobilestylegan, load_recogniser, load_swapper
from scol_ops.models.files import WeightsError
from scol_ops.models.recognisers import ffhq_mean_geometry
from scol_ops.models.swapper import FIRST, LAST, Swapper
from scol_ops.paste import face_mask
from scol_ops.swap import swap

PAIRS = 8


def draw(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 192, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def mapper() -> Swapper:
    return load_swapper()


@pytest.fixture(scope="module")
def people():
    """Generator, and PAIRS sources and targets: pictures and codes."""
    generator = load_mobilestylegan(256)
    z = torch.randn(2 * PAIRS, 512, generator=torch.Generator().manual_seed(77001))
    with torch.no_grad():
        codes = generator.mean_code + 0.7 * (generator.mapping(z) - generator.mean_code)
        codes = codes[:, None].repeat(1, 16, 1)
        pictures = torch.cat([generator(c).clamp(-1, 1) for c in codes.split(4)])
    return generator, pictures[:PAIRS], pictures[PAIRS:], codes[PAIRS:]


def test_mapper(mapper):
    embeddings = torch.nn.functional.normalize(draw(3, 1), dim=1).requires_grad_(True)
    codes = mapper(embeddings)
    assert codes.shape == (3, LAST - FIRST, 512) and torch.isfinite(codes).all()
    assert not torch.allclose(codes[0], codes[1], atol=0.05)
    codes.square().sum().backward()
    assert (embeddings.grad.abs().sum(1) > 0).all() and not any(p.requires_grad for p in mapper.parameters())
    with pytest.raises(ValueError, match=r"\(B, 192\)"):
        mapper(draw(3, 1)[:, :100])


def test_loader_refuses_another_file(monkeypatch):
    monkeypatch.setitem(files.SHA256, "swapper.safetensors", "0" * 64)
    with pytest.raises(WeightsError, match="refused"):
        load_swapper()


def test_swap_replaces_identity_layers_inside_the_mask():
    """A generator that paints what it is given: each code's first number."""
    target, codes = torch.zeros(2, 3, 256, 256), torch.arange(16.0)[None, :, None].repeat(2, 1, 512) / 100
    asked = []

    def generator(c: torch.Tensor) -> torch.Tensor:
        asked.append(c)
        return torch.full((2, 3, 256, 256), 3.0)  # beyond the range: clamped

    mask = torch.zeros(1, 1, 256, 256)
    mask[..., 100:150, 100:150], mask[..., 0, 0] = 1, 0.25
    source = draw(2, 2)
    found = swap(target, codes, source, lambda e: torch.full((2, LAST - FIRST, 512), 9.0), generator, mask)
    assert found.codes is asked[0] and found.codes.shape == codes.shape
    inside = torch.zeros(16, dtype=torch.bool)
    inside[FIRST:LAST] = True
    assert (found.codes[:, inside] == 9).all() and torch.equal(found.codes[:, ~inside], codes[:, ~inside])
    assert torch.equal(found.pictures, mask.expand(2, 3, -1, -1))
    raw = swap(target, codes, source, lambda e: codes[:, FIRST:LAST], generator)
    assert (raw.pictures == 1).all() and torch.equal(raw.codes, codes)


@pytest.mark.parametrize("wrong", ["target", "codes", "source", "mask"])
def test_swap_refuses_other_shapes(wrong):
    good = {"target": (2, 3, 256, 256), "codes": (2, 16, 512), "source": (2, 192), "mask": (2, 1, 256, 256)}
    bad = {"target": (2, 3, 128, 128), "codes": (2, 18, 512), "source": (1, 192), "mask": (3, 1, 256, 256)}
    shapes = good | {wrong: bad[wrong]}
    target, codes, source, mask = (torch.zeros(shapes[n]) for n in good)
    with pytest.raises(ValueError, match=wrong):
        swap(target, codes, source, lambda e: e, lambda c: c, mask)


def test_a_swap_shows_the_source(mapper, people):
    """By two recognisers that the oracle does not know; the mask keeps the target's rim."""
    generator, sources, targets, codes = people
    geometry = ffhq_mean_geometry(PAIRS, 256)
    mask = face_mask(geometry[0][:1])
    with torch.no_grad():
        identity = load_recogniser("mobilefacenet").embed_crops(sources, *geometry)
        found = torch.cat([
            swap(*(x[i : i + 4] for x in (targets, codes, identity)), mapper, generator, mask).pictures for i in (0, 4)
        ])  # fmt: skip
        for name in ("dlib_resnet", "faceres"):
            network = load_recogniser(name)
            a, b, s = (network.embed_crops(x, *geometry) for x in (sources, targets, found))
            to_source, to_target = (s * a).sum(1), (s * b).sum(1)
            assert int((to_source > to_target).sum()) >= 6, name
            # Not by chance, nor by faces that everybody resembles: each swap is nearest its own source.
            assert int(((s @ a.T).argmax(1) == torch.arange(PAIRS)).sum()) >= 4, name
    outside = (mask == 0).expand_as(found)
    assert torch.equal(found[outside], targets[outside]) and not torch.allclose(found, targets, atol=0.1)
