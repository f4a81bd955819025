"""The embedded generator against OpenVINO running the exported graphs, and its 256 px head against 1024 px."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from scol_ops.models import files
from scol_ops.models.embedded import load_encoder, load_mobilestylegan, load_recogniser
from scol_ops.models.files import WeightsError
from scol_ops.models.mobilestylegan import MobileStyleGAN, inverse_haar
from scol_ops.models.openvino_ir import IRFormatError, read_constants
from scol_ops.models.recognisers import ffhq_mean_geometry

DATA = Path(importlib.util.find_spec("random_face").origin).parent / "data"


def openvino_output(name: str, x: torch.Tensor) -> torch.Tensor:
    openvino = pytest.importorskip("openvino", reason="openvino is a test-only dependency (requirements-test.txt)")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(DATA / f"{name}.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(np.array(next(iter(compiled(x.numpy()).values()))))


def test_mapping_and_synthesis_equal_openvino():
    generator = load_mobilestylegan(1024)
    z = torch.randn(1, 512, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        w = generator.mapping(z)
        assert float((w - openvino_output("MappingNetwork", z)).abs().max()) < 1e-4
        # Truncated by 0.7, as pictures are usually drawn: far from the mean both sides' float32 rounding
        # reaches 2e-4 (measured against float64), which says nothing about the layers.
        w = generator.mean_code + 0.7 * (w - generator.mean_code)
        ours = generator(w[:, None].expand(-1, 16, -1))
    difference = float((ours - openvino_output("SynthesisNetwork", w)).abs().max())
    assert ours.shape == (1, 3, 1024, 1024) and float(ours.std()) > 0.2
    assert difference < 1e-4, difference


def test_head_resembles_the_full_picture_averaged_down():
    # The measured mean over 200 unseen samples is in the card; four samples must not fall far below it.
    small, full = load_mobilestylegan(256), load_mobilestylegan(1024)
    values = []
    for seed in range(4):
        z = torch.randn(2, 512, generator=torch.Generator().manual_seed(100 + seed))
        with torch.no_grad():
            w = small.mean_code + 0.7 * (small.mapping(z) - small.mean_code)
            cut = 16 if seed % 2 == 0 else 8  # half style-mixed
            codes = torch.cat((w[:1].expand(cut, -1), w[1:].expand(16 - cut, -1)))[None]
            a, b = small(codes).clamp(-1, 1), F.avg_pool2d(full(codes), 4).clamp(-1, 1)
        values.append(10 * np.log10(4 / float((a - b).square().mean())))
    assert np.mean(values) > 28, values


def test_inverse_haar_inverts_the_transform():
    x = torch.randn(2, 3, 8, 8)
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    low = (a + b + c + d) / 2
    details = torch.stack(((a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2), dim=2)
    bands = torch.cat((low, details.flatten(1, 2)), dim=1)
    assert torch.allclose(inverse_haar(bands), x, atol=1e-6)


def test_shapes_are_checked():
    generator = load_mobilestylegan(256)
    with pytest.raises(ValueError, match="codes"):
        generator(torch.zeros(1, 18, 512))
    with pytest.raises(ValueError, match="z must be"):
        generator.mapping(torch.zeros(512))
    with pytest.raises(ValueError, match="resolution"):
        MobileStyleGAN(512)


def test_encoder_inverts_better_than_the_mean():
    generator, encoder = load_mobilestylegan(256), load_encoder()
    z = torch.randn(4, 512, generator=torch.Generator().manual_seed(55))
    with torch.no_grad():
        w = generator.mean_code + 0.7 * (generator.mapping(z) - generator.mean_code)
        codes = w[:, None].expand(-1, 16, -1)
        pictures = torch.cat([generator(c).clamp(-1, 1) for c in codes.split(1)])
        predicted = encoder(pictures)
        alone = torch.cat([encoder(p) for p in pictures.split(1)])
        again = torch.cat([generator(c).clamp(-1, 1) for c in predicted.split(1)])
        of_mean = generator(generator.mean_code.expand(1, 16, -1)).clamp(-1, 1)
    unexplained = (predicted - codes).square().sum() / (generator.mean_code - codes).square().sum()
    assert float(unexplained) < 0.6
    gain = 10 * torch.log10((pictures - of_mean).square().mean((1, 2, 3)) / (pictures - again).square().mean((1, 2, 3)))
    assert float(gain.mean()) > 3, gain  # dB
    assert torch.allclose(alone, predicted, atol=1e-4)
    judge, geometry = load_recogniser("faceres"), ffhq_mean_geometry(4, 256)  # the encoder reads MobileFaceNet
    with torch.no_grad():
        person, kept = (judge.embed_crops(p, *geometry) for p in (pictures, again))
    alike = person @ kept.T
    assert torch.equal(alike.argmax(1), torch.arange(4)), alike  # each picture's code shows the same person
    with pytest.raises(ValueError, match="faces"):
        encoder(torch.zeros(1, 3, 128, 128))


def test_packed_weights_come_back(tmp_path, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    big, small = torch.randn(60, 5, 30, 30, generator=rng), torch.randn(60, 5, generator=rng)
    big[3] *= 1e-4
    big[7] = 0
    packed = files.pack({"big": big, "small": small, "vector": torch.randn(200_000, generator=rng)})
    assert [packed[k].dtype for k in ("big", "small", "vector")] == [torch.int8, torch.float16, torch.float16]
    save_file(packed, tmp_path / "packed.safetensors")
    digest = hashlib.sha256((tmp_path / "packed.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(files, "DATA", tmp_path)
    monkeypatch.setitem(files.SHA256, "packed.safetensors", digest)
    found = files.read_safetensors("packed.safetensors")
    assert set(found) == {"big", "small", "vector"} and all(v.dtype == torch.float32 for v in found.values())
    largest = big.flatten(1).abs().amax(1)
    assert ((found["big"] - big).flatten(1).abs().amax(1) <= 0.501 * largest / 127 + 1e-12).all()
    assert torch.equal(found["small"], small.half().float())


def test_altered_weights_are_refused(tmp_path, monkeypatch):
    name = "encoder.safetensors"
    content = bytearray((files.DATA / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(files, "DATA", tmp_path)
    with pytest.raises(WeightsError, match="sha256"):
        load_encoder()
    with pytest.raises(WeightsError, match="cannot read"):
        files.read_verified("mobilestylegan_head256.safetensors")
    with pytest.raises(WeightsError, match="unknown"):
        files.read_verified("../../etc/passwd")


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (b"not xml", "not an OpenVINO IR"),
        (b"<net><layers/></net>", "not an OpenVINO IR"),
        (b'<net><layers><layer id="0" name="c" type="Const"><data element_type="f32" shape="4" offset="0" size="16"/>'
         b"</layer></layers><edges/></net>", "does not fit"),
        (b'<net><layers><layer id="0" name="c" type="Const"><data element_type="f32" shape="1" offset="-4" size="4"/>'
         b"</layer></layers><edges/></net>", "does not fit"),
        (b'<net><layers><layer id="0" name="c" type="Const"><data element_type="u4" shape="1" offset="0" size="4"/>'
         b"</layer></layers><edges/></net>", "element type"),
    ],
)
def test_broken_graphs_are_refused(xml, message):
    with pytest.raises(IRFormatError, match=message):
        read_constants(xml, b"\0" * 8)
