"""Files that nobody trusts: nothing in them runs, and each ends in a clear error; well-meant ones are read."""

from __future__ import annotations

import argparse
import builtins
import functools
import io
import os
import pickle
import random
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scol_ops.models import checkpoints, pickle_reader
from scol_ops.models.checkpoints import CheckpointError, load_public, read_checkpoint
from scol_ops.models.mobilefacenet512 import MobileFaceNet512
from scol_ops.models.stylegan2 import NVIDIA, StyleGAN2
from tests.helpers.fabricate import as_module, e4e_file, nvidia_pickle, torch_file, whole_module

MARKER = "scol-untrusted-was-run"


class Reduce:
    """Pickles as a call of anything."""

    def __init__(self, *reduced) -> None:
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


class Build:
    """Pickles as an object whose ``__setstate__`` the loader would call."""

    def __reduce__(self):
        return (Build, (), {"command": f"touch {MARKER}"})

    def __setstate__(self, state):
        open(MARKER, "w").close()


def command(name: str = MARKER) -> str:
    return f"touch {name}"


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def storage_pickle(numel: int, shape: tuple[int, ...], stride: tuple[int, ...] | None = None, offset: int = 0) -> bytes:
    """data.pkl of one tensor ``x`` with whatever sizes, written instruction by instruction."""

    def number(value: int) -> bytes:
        return pickle.LONG1 + bytes([8]) + value.to_bytes(8, "little", signed=True)

    def word(text: str) -> bytes:
        return pickle.BINUNICODE + struct.pack("<I", len(text)) + text.encode()

    stride = stride if stride is not None else (1,) * len(shape)
    return b"".join([
        pickle.PROTO, b"\x02", pickle.EMPTY_DICT, word("input.input"), b"ctorch._utils\n_rebuild_tensor_v2\n",
        pickle.MARK,
        pickle.MARK, word("storage"), b"ctorch\nFloatStorage\n", word("0"), word("cpu"), number(numel), pickle.TUPLE,
        pickle.BINPERSID, number(offset), pickle.MARK, *map(number, shape), pickle.TUPLE,
        pickle.MARK, *map(number, stride), pickle.TUPLE, pickle.NEWFALSE, b"ccollections\nOrderedDict\n)R",
        pickle.TUPLE,
        pickle.REDUCE, pickle.SETITEM, pickle.STOP,
    ])  # fmt: skip


def laughs() -> bytes:
    """A tuple nested in itself sixty times, as a dictionary's key: hashing it would take for ever."""
    return b"\x80\x02}(" + b")" + b"".join(pickle.BINPUT + b"\0" + b"h\0\x86" for _ in range(60)) + b"K\x01u."


@functools.cache
def corpus() -> dict[str, bytes]:
    evil = Reduce(os.system, (command(),))
    run = Reduce(builtins.eval, (f"open({MARKER!r}, 'w').close()",))
    nested = Reduce(builtins.getattr, (Reduce(builtins.__import__, ("os",)), "system"))
    state = {"input.input": torch.zeros(1, 512, 4, 4)}
    plain = pickle.dumps({"G_ema": evil})
    data = storage_pickle(4, (4,))
    return {
        "os.system": plain,
        "os.system, protocol 0": pickle.dumps({"G_ema": evil}, 0),
        "os.system in a torch zip": torch_file({"g_ema": state, "opts": evil}),
        "os.system in a torch stream": torch_file({"g_ema": state, "opts": evil}, old=True),
        "builtins.eval": torch_file({"g_ema": run}),
        "builtins.exec": pickle.dumps(Reduce(exec, (f"open({MARKER!r}, 'w')",))),
        "nested reduce": torch_file({"g_ema": Reduce(map, (nested, [command()]))}),
        "a call of a call": b"\x80\x02cbuiltins\ngetattr\n(cbuiltins\n__import__\nX\x02\0\0\0os\x85RX\x06\0\0\0systemtR"
        + b"X"
        + struct.pack("<I", len(command()))
        + command().encode()
        + b"\x85R.",
        "__setstate__": torch_file({"g_ema": Build()}),
        "code in NVIDIA's way": nvidia_pickle(state),
        "a whole module": whole_module(state, old=True),
        "INST": b"\x80\x02(X\x04\0\0\0echoios\nsystem\n.",
        "OBJ": b"\x80\x02(cos\nsystem\nX\x04\0\0\0echoo.",
        "NEWOBJ": b"\x80\x02cos\nsystem\nX\x04\0\0\0echo\x85\x81.",
        "an extension code": b"\x80\x02\x82\x01.",
        "a buffer from outside": b"\x80\x05\x97.",
        "an inner file with code": pickle.dumps(Reduce(torch.storage._load_from_bytes, (torch_file(evil, old=True),))),
        "zip with traversal": zipped({"../../etc/evil": b"x", "archive/data.pkl": data, "archive/data/0": bytes(16)}),
        "zip with an absolute name": zipped({"/tmp/evil": b"x", "archive/data.pkl": data, "archive/data/0": bytes(16)}),
        "compressed zip": zipped({"archive/data.pkl": data, "archive/data/0": bytes(1 << 22)}, zipfile.ZIP_DEFLATED),
        "no tensor's data": zipped({"archive/data.pkl": data}),
        "oversize storage": zipped(
            {"archive/data.pkl": storage_pickle(1 << 40, (1 << 40,)), "archive/data/0": bytes(16)}
        ),
        "oversize storage in a stream": torch_file(state, old=True).replace(
            struct.pack("<q", 8192) + bytes(8), struct.pack("<q", 1 << 40) + bytes(8)
        ),
        "absurd shape": zipped(
            {"archive/data.pkl": storage_pickle(4, (1 << 40, 1 << 40)), "archive/data/0": bytes(16)}
        ),
        "absurd shape by stride 0": zipped(
            {"archive/data.pkl": storage_pickle(4, (1, 512, 1 << 30, 4), (0, 0, 0, 0)), "archive/data/0": bytes(16)}
        ),
        "negative shape": zipped({"archive/data.pkl": storage_pickle(4, (-4,)), "archive/data/0": bytes(16)}),
        "negative offset": zipped(
            {"archive/data.pkl": storage_pickle(4, (4,), offset=-4), "archive/data/0": bytes(16)}
        ),
        "beyond its storage": zipped(
            {"archive/data.pkl": storage_pickle(4, (1, 512, 4, 4)), "archive/data/0": bytes(16)}
        ),
        "tuples in tuples as a key": laughs(),
        "a list as a key": b"\x80\x02}]K\x01s.",
        "a number of many digits": b"\x80\x02L" + b"9" * 100_000 + b"L\n.",
        "bytes beyond the end": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"x.",
        "a memo far away": b"\x80\x02N" + b"r" + struct.pack("<I", 0xFFFFFFF0) + b".",
        "an empty stack": b"\x80\x02R.",
        "no end": b"\x80\x02}",
        "a cut zip": torch_file(state)[:-40],
        "a cut stream": torch_file(state, old=True)[:-40],
        "nothing": b"",
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "a web page": b"<!DOCTYPE html><html>Quota exceeded</html>",
        "broken safetensors": struct.pack("<Q", 20) + b'{"a":{"dtype":"F32"}',
        "safetensors beyond the end": struct.pack("<Q", 1 << 60) + b"{}",
    }


@pytest.mark.parametrize("name", sorted(corpus()))
def test_nothing_runs_and_the_error_is_clear(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def never(*arguments, **more):
        raise AssertionError(f"called with {arguments}")

    content = corpus()[name]
    monkeypatch.setattr(os, "system", never)  # eval and exec are what pytest itself lives on: there the marker tells
    checkpoints.FAMILIES["stylegan2"].build({"size": 4, "multiplier": 2, "mapping_layers": 1, "layout": "nvidia"})
    begin = time.monotonic()
    with pytest.raises(CheckpointError) as error:
        tracemalloc.start()
        try:
            content = read_checkpoint(content)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        load_public("stylegan2", content.value)
    assert not (tmp_path / MARKER).exists(), "the file's code was run"
    assert not list(tmp_path.iterdir()) and len(str(error.value)) > 10
    assert time.monotonic() - begin < 20 and peak < (64 << 20) + 4 * len(corpus()[name])


def test_the_corpus_would_run_in_an_unpickler(tmp_path: Path, monkeypatch) -> None:
    """The corpus can fail: where the same bytes are unpickled, the marker appears."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(corpus()["os.system"])
    assert (tmp_path / MARKER).exists()


def test_what_was_skipped_is_told() -> None:
    content = read_checkpoint(corpus()["os.system in a torch zip"])
    name = f"{os.system.__module__}.system"
    assert content.skipped == {name: 1} and content.value["g_ema"]["input.input"].shape == (1, 512, 4, 4)
    skipped = read_checkpoint(corpus()["code in NVIDIA's way"]).skipped
    assert skipped["source code of Generator"] == 2 and "dnnlib.util.EasyDict" in skipped


@pytest.mark.parametrize("old", [False, True])
def test_a_whole_module_gives_its_tensors(old: bool) -> None:
    network = MobileFaceNet512().eval()
    state = checkpoints.to_public("mobilefacenet-512", network)
    content = read_checkpoint(whole_module(state, old))
    assert content.skipped["arcface_models.resnet.ResNet"] > 100
    again = checkpoints.to_public("mobilefacenet-512", load_public("mobilefacenet-512", content.value).network)
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)


def test_reader_agrees_with_torch() -> None:
    """Views, halves, bools, shared storages, parameters: what the reader describes is what PyTorch loads."""
    base = torch.arange(24.0).reshape(4, 6)
    value = OrderedDict(
        all=base, view=base[1:3, ::2], turned=base.T, half=base.half(), brain=base.bfloat16(),
        ints=torch.tensor([3, -4]),
        bools=torch.tensor([True, False]), scalar=torch.tensor(5), none=torch.empty(0, 3),
        grown=torch.ones(1).expand(4, 3),
        parameter=torch.nn.Parameter(base.clone()), inner=[{"a": (base[0], "word", 1.5, None, True)}],
    )  # fmt: skip

    def same(one, other) -> None:
        if isinstance(one, torch.Tensor):
            assert other.shape == one.shape and other.dtype == one.dtype and torch.equal(other.read(), one)
        elif isinstance(one, dict):
            assert list(one) == list(other)
            for key in one:
                same(one[key], other[key])
        elif isinstance(one, list | tuple):
            assert type(one) is type(other) and len(one) == len(other)
            for a, b in zip(one, other, strict=True):
                same(a, b)
        else:
            assert one == other

    for old in (False, True):
        tree = pickle_reader.read(torch_file(value, old))
        same(value, tree.value)
        assert tree.form == ("stream" if old else "zip") and not tree.skipped
    same(value, pickle_reader.read(pickle.dumps(value)).value)


def test_options_as_namespace_are_allowed() -> None:
    content = read_checkpoint(e4e_file({}, torch.zeros(10, 512), namespace=True))
    assert isinstance(content.value["opts"], argparse.Namespace) and not content.skipped


def stylegan2_file(change: Callable[[dict], None], layout: str = "rosinality", size: int = 8) -> bytes:
    network = StyleGAN2(size, layout=layout)
    state = {k: v.detach().clone() for k, v in checkpoints.to_public("stylegan2", network).items()}
    change(state)
    return nvidia_pickle(state) if layout == NVIDIA else torch_file({"g_ema": state})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("conv1.activate.bias"), "missing: conv1.activate.bias"),
        (lambda s: s.update({"conv1.noise.weight": torch.zeros(3)}), r"conv1.noise.weight is \(3,\) instead of \(1,\)"),
        (lambda s: s.update({"conv2.weight": torch.zeros(3)}), "unknown: conv2.weight"),
        (lambda s: s["to_rgbs.0.upsample.kernel"].mul_(0.25), r"to_rgbs.0.upsample.kernel is not the \[1, 3, 3, 1\]"),
    ],
)
def test_wrong_entries_are_named(change, words) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_public("stylegan2", read_checkpoint(stylegan2_file(change)).value)


def test_labelled_generators_are_refused() -> None:
    content = stylegan2_file(lambda s: s.update({"mapping.embed.weight": torch.zeros(512, 10)}), NVIDIA)
    with pytest.raises(CheckpointError, match="class labels"):
        load_public("stylegan2", read_checkpoint(content).value)


def test_noise_maps_may_be_missing() -> None:
    def drop(state):
        for name in [n for n in state if n.startswith("noises.")]:
            del state[name]

    content = stylegan2_file(drop)
    one, two = (load_public("stylegan2", read_checkpoint(content).value) for _ in range(2))
    assert any("noise maps" in note for note in one.notes) and any("latent_avg" in note for note in one.notes)
    assert (
        torch.equal(one.network.noises.noise_2, two.network.noises.noise_2) and one.network.noises.noise_2.std() > 0.5
    )


def test_a_module_of_endless_modules_ends() -> None:
    module = as_module({"a.weight": torch.zeros(1)})
    for _ in range(40):
        outer = torch.nn.Module()
        outer.left, outer.right = module, module
        module = outer
    content = read_checkpoint(torch_file({"g_ema": module}))
    with pytest.raises(CheckpointError, match="more than 20000 modules"):
        load_public("stylegan2", content.value)
    assert len(repr(content.value)) < 1000


def test_damaged_files_end_in_errors_of_ours() -> None:
    """Seeded damage to files of each form: read, or refused by ``CheckpointError``, and nothing else."""
    state = {
        "input.input": torch.zeros(1, 8, 4, 4),
        "b": torch.arange(6.0).reshape(2, 3).T,
        "flag": torch.tensor([True]),
    }
    options = argparse.Namespace(size=8)
    files = [
        torch_file({"g_ema": state, "opts": options}),
        torch_file({"g_ema": state}, old=True),
        nvidia_pickle(state),
    ]
    rng, refused = random.Random(0), 0
    for _ in range(400):
        content = bytearray(rng.choice(files))
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            place, kind = rng.randrange(len(content)), rng.random()
            if kind < 0.6:
                content[place] = rng.randrange(256)
            elif kind < 0.8:
                del content[place : place + rng.randrange(1, 9)]
            else:
                content[place:place] = rng.randbytes(rng.randrange(1, 9))
        try:
            value = read_checkpoint(bytes(content)).value
            load_public("stylegan2", value)
        except CheckpointError:
            refused += 1
    assert refused == 400, "not one of them is a StyleGAN2"
