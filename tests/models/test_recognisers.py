import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scol_ops.models import files
from scol_ops.models.embedded import RECOGNISERS, load_mobilestylegan, load_recogniser
from scol_ops.models.files import WeightsError
from scol_ops.models.recognisers import ARCFACE_LANDMARKS, Recogniser, box_alignment, ffhq_mean_geometry
from scol_ops.warp import (
    GeometryError,
    crop_transform,
    invert_affine,
    transform_boxes,
    transform_points,
    warp_affine,
)

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "embedded"


@pytest.fixture(scope="module")
def networks() -> dict[str, Recogniser]:
    return {name: load_recogniser(name) for name in RECOGNISERS}


@pytest.fixture(scope="module")
def faces() -> torch.Tensor:
    """Two generated people, (2, 3, 512, 512)."""
    generator = load_mobilestylegan(1024)
    z = torch.randn(2, 512, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        w = generator.mean_code + 0.8 * (generator.mapping(z) - generator.mean_code)
        pictures = generator(w[:, None].expand(-1, generator.num_codes, -1))
    return F.avg_pool2d(pictures, 2).clamp(-1, 1)


@pytest.fixture(scope="module")
def crops(faces) -> torch.Tensor:
    return F.avg_pool2d(faces, 2)


# The vectors were computed by those who extracted the weights; tolerances are those they state.
@pytest.mark.parametrize(("name", "tolerance"), [("mobilefacenet", 1e-5), ("dlib_resnet", 1e-4), ("faceres", 1e-5)])
def test_golden_vector(networks, name, tolerance):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as golden:
        image = torch.from_numpy(golden["image"]).permute(2, 0, 1)[None].float() / 127.5 - 1
        expected = golden["descriptor" if name == "dlib_resnet" else "embedding"]
    network = networks[name]
    with torch.no_grad():
        ours = (network.descriptor if name == "dlib_resnet" else network.embed_aligned)(image)[0].numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", RECOGNISERS)
def test_attributes(networks, crops, name):
    network = networks[name]
    assert network.name == name and not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert network.fingerprint == files.SHA256[f"{name}.safetensors"][:16]
    assert (files.DATA / f"{name}.md").is_file()
    embeddings = network.embed_crops(crops, *ffhq_mean_geometry(2, 256))
    assert embeddings.shape == (2, network.dim)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("name", RECOGNISERS)
def test_photo_and_crop_agree(networks, faces, name):
    # A photo of both people, the second large and tilted; crops of 256 px cut from it as the align stage does.
    network, size = networks[name], 256
    photo = torch.full((1, 3, 900, 1300), 0.1)
    placements = torch.tensor([  # FFHQ picture -> photo
        [[0.9, 0.0, 60.0], [0.0, 0.9, 150.0]],
        [[1.4 * math.cos(0.12), -1.4 * math.sin(0.12), 600.0], [1.4 * math.sin(0.12), 1.4 * math.cos(0.12), 60.0]],
    ])
    covered = warp_affine(torch.ones(2, 1, 512, 512), invert_affine(placements), (900, 1300)) > 0.999
    pasted = warp_affine(faces, invert_affine(placements), (900, 1300))
    for picture, where in zip(pasted, covered, strict=True):
        photo = torch.where(where, picture, photo)
    landmarks, boxes = ffhq_mean_geometry(2, 512)
    landmarks = transform_points(landmarks, placements)
    boxes = transform_boxes(boxes[:, None], placements)[:, 0]
    corners = torch.tensor([[-0.5, -0.5], [-0.5, 511.5], [511.5, 511.5], [511.5, -0.5]])
    to_photo = crop_transform(transform_points(corners, placements), size)
    crops = warp_affine(photo, to_photo, size)
    to_crop = invert_affine(to_photo)
    from_photo = network.embed_photo(photo, landmarks, boxes)
    from_crops = network.embed_crops(
        crops, transform_points(landmarks, to_crop), transform_boxes(boxes[:, None], to_crop)[:, 0]
    )
    assert (from_photo * from_crops).sum(1).min() > 0.95
    # and the agreement is that of one person: across the two it is much lower
    assert (from_photo * from_crops).sum(1).min() > (from_photo @ from_crops.T).fill_diagonal_(-1).max() + 0.05


@pytest.mark.parametrize("name", RECOGNISERS)
def test_a_batch_changes_nothing(networks, crops, name):
    network, (landmarks, boxes) = networks[name], ffhq_mean_geometry(2, 256)
    landmarks[1] = (landmarks[1] - 128) * 0.4 + 128  # shrinks by another factor, so filtered otherwise
    boxes[1] = (boxes[1] - 128) * 0.4 + 128
    together = network.embed_crops(crops, landmarks, boxes)
    alone = torch.cat([network.embed_crops(crops[i : i + 1], landmarks[i : i + 1], boxes[i : i + 1]) for i in (0, 1)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert network.embed_photo(crops[:1], landmarks[:0], boxes[:0]).shape == (0, network.dim)


@pytest.mark.parametrize("name", RECOGNISERS)
def test_landmarks_and_boxes_move_with_the_picture(networks, crops, name):
    network, (landmarks, boxes) = networks[name], ffhq_mean_geometry(1, 256)
    shifted = F.pad(crops[:1], (37, 0, 21, 0))
    shift = torch.tensor([37.0, 21.0])
    same = network.embed_crops(crops[:1], landmarks, boxes)
    moved = network.embed_photo(shifted, landmarks + shift, boxes + shift.repeat(2))
    assert float(same[0] @ moved[0]) > 0.9999
    assert float(same[0] @ network.embed_photo(shifted, landmarks, boxes)[0]) < 0.99


@pytest.mark.parametrize("name", RECOGNISERS)
def test_gradient_reaches_the_crop_and_is_right(crops, name):
    network = load_recogniser(name).double()
    other = F.normalize(torch.randn(network.dim, generator=torch.Generator().manual_seed(1)).double(), dim=0)
    x = crops.double().requires_grad_()
    geometry = ffhq_mean_geometry(2, 256)

    def cosines(pictures):
        return network.embed_crops(pictures, *geometry) @ other

    (gradient,) = torch.autograd.grad(cosines(x).sum(), x)
    assert bool(gradient.isfinite().all())
    # every pixel of the inner face counts: none is skipped by the shrinking warp
    assert bool((gradient[:, :, 110:170, 100:156].abs().sum(1) > 0).all())
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    step = 1e-8  # small, or some of half a million rectifiers change side within it
    with torch.no_grad():
        measured = (cosines(x + step * direction) - cosines(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), measured, rtol=1e-4, atol=1e-6)


def test_gradient_reaches_the_photo(networks, crops):
    photo = crops[:1].clone().requires_grad_()
    landmarks, boxes = ffhq_mean_geometry(2, 256)
    for network in networks.values():
        (gradient,) = torch.autograd.grad(network.embed_photo(photo, landmarks, boxes).std(), photo)
        assert bool(gradient.isfinite().all()) and float(gradient[..., 110:170, 100:156].abs().sum()) > 0


def test_arcface_alignment_puts_landmarks_on_their_template(networks):
    landmarks = transform_points(ARCFACE_LANDMARKS[None], torch.tensor([[[1.8, 0.3, 70.0], [-0.3, 1.8, 40.0]]]))
    matrix = networks["mobilefacenet"].alignment(landmarks, torch.zeros(1, 4))
    torch.testing.assert_close(transform_points(ARCFACE_LANDMARKS[None], matrix), landmarks, atol=1e-3, rtol=0)


def test_dlib_alignment_has_the_eyes_where_dlib_has_them(networks):
    template = networks["dlib_resnet"].template
    # By hand: ((38.2946 - 56) 1.114 + 56) 150 / 112 and ((51.6963 - 56) 1.114 + 56 - 15.904) 150 / 112
    torch.testing.assert_close(template[0], torch.tensor([48.5846, 47.2790]), atol=1e-3, rtol=0)


def test_box_alignment_by_hand():
    matrix = box_alignment(torch.tensor([[10.0, 20.0, 30.0, 60.0]]), 1.5, 30)  # 60 px about (20, 40): 2 px a pixel
    torch.testing.assert_close(matrix[0], torch.tensor([[2.0, 0.0, -9.0], [0.0, 2.0, 11.0]]))


def test_outside_the_photo_is_black(networks):
    white = torch.ones(1, 3, 64, 64)
    landmarks, boxes = ffhq_mean_geometry(1, 64)
    aligned = networks["faceres"].align(white, landmarks - 40, boxes - 40)
    assert float(aligned[0, :, 0, 0].max()) == pytest.approx(-1, abs=1e-6)
    assert float(aligned[0, :, -1, -1].min()) == pytest.approx(1, abs=1e-5)


def test_bad_input_is_refused(networks, crops):
    network, (landmarks, boxes) = networks["mobilefacenet"], ffhq_mean_geometry(2, 256)
    for call in (
        lambda: network.embed_photo(crops, landmarks, boxes),
        lambda: network.embed_crops(crops, landmarks[:1], boxes[:1]),
        lambda: network.embed_crops(crops, landmarks[:, :4], boxes),
        lambda: network.embed_crops(crops, landmarks, boxes[:1]),
        lambda: network.embed_crops(crops[:, :1], landmarks, boxes),
        lambda: network.embed_photo(crops[0], landmarks, boxes),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(GeometryError):
        network.embed_crops(crops, torch.zeros_like(landmarks), boxes)
    with pytest.raises(GeometryError):
        networks["faceres"].embed_crops(crops, landmarks, boxes[:, [2, 1, 0, 3]])
    with pytest.raises(GeometryError):
        networks["faceres"].embed_crops(crops, landmarks, torch.full_like(boxes, math.nan))


def test_loader_refuses_other_names_and_other_weights(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="mobilefacenet"):
        load_recogniser("arcface")
    content = bytearray((files.DATA / "mobilefacenet.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "mobilefacenet.safetensors").write_bytes(content)
    monkeypatch.setattr(files, "DATA", tmp_path)
    with pytest.raises(WeightsError, match="refused"):
        load_recogniser("mobilefacenet")


def test_double_keeps_double(crops):
    network = load_recogniser("mobilefacenet").double()
    assert network.embed_crops(crops.double(), *ffhq_mean_geometry(2, 256)).dtype == torch.float64
