"""The training commands for a few steps at tiny sizes: what they write, and going on after a cut."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from pipelines.training import mean_code, train_encoder, train_head, train_swapper
from pipelines.training.loop import Loop
from scol_ops.models import embedded, files
from scol_ops.models.encoder import Encoder
from scol_ops.models.swapper import Swapper


class CutOff(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Four faces in a chunk; training on one thread, whose sums are the same each time."""
    threads, chunk = torch.get_num_threads(), train_encoder.CHUNK
    train_encoder.CHUNK = 4
    yield
    train_encoder.CHUNK = chunk
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Folders of pictures and of the preview, as the encoder's and the swapper's training need them."""
    folder = tmp_path_factory.mktemp("faces")
    words = ["--folder", folder / "data", "--out", folder / "encoder"]
    train_encoder.main([*map(str, words), "--make", "2", "--preview", "0.0001"])
    return folder


def run(main, *words, cut: int | None = None, monkeypatch=None) -> None:
    """The command, at its end, or cut off after so many steps with a checkpoint after every second one."""
    words = [str(word) for word in words]
    if cut is None:
        return main(words)
    step, left = Loop.step, [cut]

    def until(self, *args):
        if not left[0]:
            raise CutOff
        left[0] -= 1
        self.every = 2
        step(self, *args)

    with monkeypatch.context() as patched, pytest.raises(CutOff):
        patched.setattr(Loop, "step", until)
        main(words)


def same(a, b) -> bool:
    one, two = load_file(a), load_file(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def resumes(main, words, out, name: str, monkeypatch) -> None:
    """Cut off after two of three steps, and started again: the weights of a run that was left alone."""
    words = [*words, "--steps", 3, "--seed", 1]
    run(main, *words, "--out", out / "whole")
    run(main, *words, "--out", out / "cut", cut=2, monkeypatch=monkeypatch)
    assert json.loads((out / "cut/training.json").read_text())["steps"] == 2
    assert not same(out / f"cut/{name}.safetensors", out / f"whole/{name}.safetensors")
    run(main, *words, "--out", out / "cut")
    for file in (f"{name}.safetensors", f"{name}-checkpoint.safetensors"):
        assert same(out / "cut" / file, out / "whole" / file), file
    assert json.loads((out / "cut/training.json").read_text())["steps"] == 3


def loads(monkeypatch, folder, file: str, load):
    """What the package's loader makes of a file in the place of its own."""
    digest = files.hashlib.sha256((folder / file).read_bytes()).hexdigest()
    with monkeypatch.context() as patched:
        own = files.read_verified
        patched.setattr(files, "read_verified", lambda name: files.read_checked(folder / file, digest)
                        if name == file else own(name))  # fmt: skip
        return load()


def test_the_head(tmp_path, monkeypatch):
    for seed in (1, 2):
        train_head.main(["--folder", f"{tmp_path}/data", "--make", "2", "--seed", str(seed)])
    words = ["--folder", tmp_path / "data", "--batch", 2]
    resumes(train_head.main, words, tmp_path, "head", monkeypatch)
    told = json.loads((tmp_path / "whole/head.json").read_text())
    assert told["steps"] == 3 and told["samples"] == 2 and told["psnr_min"] <= told["psnr_mean"]
    file = tmp_path / "whole/head.safetensors"
    assert torch.equal(train_encoder.generator_256(file).head.to_img.conv.weight, load_file(file)["to_img.conv.weight"])


def test_the_encoder(tmp_path, monkeypatch, faces):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "preview.safetensors").symlink_to(faces / "encoder/preview.safetensors")
    words = ["--folder", faces / "data", "--batch", 2, "--picture-batch", 2, "--picture-from", 0, "--full-from", 0.5]
    resumes(train_encoder.main, words, tmp_path, "encoder", monkeypatch)
    out = tmp_path / "whole"
    (tmp_path / "packed").mkdir()
    packed = tmp_path / "packed/encoder.safetensors"
    run(train_encoder.main, "--out", out, "--export", packed, "--evaluate", "--count", 2)
    told = json.loads((out / "evaluation.json").read_text())["generated"]
    assert told["faces"] == 2 and -1 <= told["cosine_faceres"] <= 1 and told["psnr"] > 0
    found = loads(monkeypatch, tmp_path / "packed", "encoder.safetensors", embedded.load_encoder)
    assert isinstance(found, Encoder)
    torch.testing.assert_close(found.base.weight, train_encoder.load_trained(out).base.weight, rtol=0, atol=1e-3)


def test_another_round_begins_with_the_average(tmp_path, faces):
    (tmp_path / "preview.safetensors").symlink_to(faces / "encoder/preview.safetensors")
    words = ["--folder", faces / "data", "--out", tmp_path, "--batch", 2, "--picture-every", 0, "--steps", 1]
    run(train_encoder.main, *words)
    before = load_file(tmp_path / "encoder.safetensors")
    run(train_encoder.main, *words, "--lr", 0)
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 2
    after = load_file(tmp_path / "encoder.safetensors")
    assert torch.equal(before["base.weight"], after["base.weight"])


def test_the_swapper(tmp_path, monkeypatch, faces):
    preview = faces / "encoder/preview.safetensors"
    run(train_swapper.main, "--faces", faces / "data", "--folder", tmp_path / "data", "--make", "--out", tmp_path)
    words = ["--folder", tmp_path / "data", "--preview", preview, "--full-from", 0.7]
    monkeypatch.setattr(train_swapper, "PAIRS", 4)
    resumes(train_swapper.main, words, tmp_path, "swapper", monkeypatch)
    out = tmp_path / "whole"
    (tmp_path / "packed").mkdir()
    run(train_swapper.main, "--out", out, "--export", tmp_path / "packed/swapper.safetensors")
    found = loads(monkeypatch, tmp_path / "packed", "swapper.safetensors", embedded.load_swapper)
    assert isinstance(found, Swapper)
    mean = load_file(out / "swapper.safetensors")["mean_code"]
    torch.testing.assert_close(found.mean_code, mean, rtol=1e-3, atol=1e-3)


def test_the_mean_code_is_the_embedded_one(tmp_path):
    mean_code.main(str(tmp_path / "mean.safetensors"))
    found = load_file(tmp_path / "mean.safetensors")["mean_code"]
    torch.testing.assert_close(found, embedded.load_mobilestylegan(256).mean_code, rtol=0, atol=1e-5)
