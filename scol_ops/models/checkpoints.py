"""Public checkpoints to networks and back: every published layout is a renaming of our networks' own entries.

``read_checkpoint`` takes a file's bytes apart without trusting them, ``load_public`` finds the network's entries in
what came out, checks names and shapes, and builds the network; ``to_public`` gives the published layout back, bit for
bit.  ``pack`` and ``unpack`` are the form of the model store (safetensors).  No file system here: bytes in, bytes out.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from scol_ops.models import pickle_reader, stylegan2, w_space
from scol_ops.models.e4e import E4E
from scol_ops.models.facenet import FaceNet, FaceNetCasia
from scol_ops.models.files import WeightsError, read_checked
from scol_ops.models.ir import IR152, IRSE50
from scol_ops.models.lpips_distance import LINEAR_SHA256, LPIPSDistance
from scol_ops.models.mobilefacenet512 import MobileFaceNet512
from scol_ops.models.pickle_reader import Skipped, TensorRef, UnreadableFile

State = dict[str, Tensor]
Entry = Tensor | TensorRef
MAX_BYTES = 8 << 30
# W statistics for files that do not bring them: how many codes.
_SHOWN = 4


class CheckpointError(WeightsError):
    """A file is not the checkpoint that it was given for; the message says what it lacks."""


@dataclass
class Content:
    """What a file holds.

    Attributes:
        value: plain containers with tensors (or ``TensorRef``) in them.
        form: ``zip``, ``stream``, ``pickle`` or ``safetensors``.
        skipped: the file's code that was not run, by name.
    """

    value: Any
    form: str
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass
class Loaded:
    """A network from a file.

    Attributes:
        network: in eval mode, parameters frozen, float32.
        facts: what its constructor takes (size, layout, classes ...), plain values.
        notes: words on what the file lacked, or had besides.
    """

    network: nn.Module
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)


# ---- files -----------------------------------------------------------------------------------------------------------


def read_checkpoint(content: bytes) -> Content:
    """Take a file apart: safetensors, a file of ``torch.save`` in either form, or a pickle of modules.

    The pickle reader, which runs nothing, looks first, at every file but safetensors: sizes, shapes, and what code is
    asked for.  Files of plain tensors then go through ``torch.load(weights_only=True)``; of the others only what the
    reader could describe is taken.

    Raises:
        CheckpointError: not such a file, or a broken or malicious one.
    """
    if len(content) > MAX_BYTES:
        raise CheckpointError(f"{len(content)} bytes, more than {MAX_BYTES}: no network here is so large")
    if content[8:9] == b"{" and 0 < int.from_bytes(content[:8], "little") <= len(content) - 8:
        try:
            return Content(load_safetensors(content), "safetensors")
        except (SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"broken safetensors file: {error}") from error
    try:
        tree = pickle_reader.read(content)
    except UnreadableFile as error:
        raise CheckpointError(str(error)) from error
    if tree.form == "pickle" or set(tree.skipped) - {"argparse.Namespace"}:
        return Content(tree.value, tree.form, dict(tree.skipped))
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return Content(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), tree.form)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, KeyError, EOFError, OSError) as error:
        raise CheckpointError(f"PyTorch cannot load it: {str(error).splitlines()[0]}") from error


def entries(value: Any, prefix: str = "") -> dict[str, Entry]:
    """Tensors of a state dict or of a whole module, whose names begin with a prefix, without it."""
    if isinstance(value, Skipped):
        try:
            value = pickle_reader.module_state(value) or value.attributes()
        except UnreadableFile as error:
            raise CheckpointError(str(error)) from error
    if not isinstance(value, Mapping):
        return {}
    return {
        key[len(prefix) :]: item
        for key, item in value.items()
        if isinstance(key, str) and key.startswith(prefix) and isinstance(item, Tensor | TensorRef)
    }


def _inside(value: Any, key: str) -> Any:
    if isinstance(value, Skipped):
        value = value.attributes()
    return value.get(key) if isinstance(value, Mapping) else None


def _read(entry: Entry) -> Tensor:
    try:
        value = entry.read() if isinstance(entry, TensorRef) else entry.detach().clone().contiguous()
    except UnreadableFile as error:
        raise CheckpointError(str(error)) from error
    return value.float() if value.is_floating_point() else value


def _words(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _fit(found: Mapping[str, Entry], wanted: Mapping[str, Sequence[int]], what: str) -> State:
    """The entries wanted, copied, after comparing names and shapes: no tensor is read before its shape is right.

    Raises:
        CheckpointError: naming what is missing, of another shape, or of no use.
    """
    missing = [name for name in wanted if name not in found]
    wrong = [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    extra = [name for name in found if name not in wanted]
    if missing or wrong or extra:
        parts = [
            f"{words}: {_words(names)}"
            for words, names in (("missing", missing), ("another shape", wrong), ("unknown", extra))
            if names
        ]
        raise CheckpointError(f"not the entries of {what}; " + "; ".join(parts))
    return {name: _read(found[name]) for name in wanted}


def _shapes(network: nn.Module, leave: Sequence[str] = ()) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in network.state_dict().items() if k not in leave}


def _empty(make: Callable[[], nn.Module]) -> nn.Module:
    """A network without numbers: only its shapes, and nothing is drawn or allocated for it."""
    with torch.device("meta"):
        return make()


def _filled(network: nn.Module, state: State) -> nn.Module:
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _one_of(value: Any, places: Sequence[tuple[str, str]], needed: str) -> dict[str, Entry]:
    """The first of (key, prefix) under which entries with a name ``needed`` lie; key "" is the file itself."""
    for key, prefix in places:
        found = entries(_inside(value, key) if key else value, prefix)
        if needed in found:
            return found
    return {}


# ---- networks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """How one kind of network is read, built and written.

    Attributes:
        build: facts -> network without numbers (on the device ``meta``).
        take: file's value -> its entries in the network's names, facts, notes.
        give: network -> its published layout.
    """

    build: Callable[[Mapping[str, Any]], nn.Module]
    take: Callable[[Any], tuple[State, dict[str, Any], list[str]]]
    give: Callable[[nn.Module], State]


def load_public(family: str, value: Any) -> Loaded:
    """A network from a file's value (``read_checkpoint(...).value``).

    Args:
        family: a key of ``FAMILIES``.

    Raises:
        CheckpointError: the file does not hold that network.
    """
    kind = FAMILIES[family]
    state, facts, notes = kind.take(value)
    return Loaded(_filled(_empty(lambda: kind.build(facts)), state), facts, notes)


def to_public(family: str, network: nn.Module) -> State:
    """The network's entries in its published layout: for StyleGAN2 the one that it was loaded from."""
    return FAMILIES[family].give(network)


def pack(family: str, loaded: Loaded) -> bytes:
    """A network as a safetensors file, with family and facts in its header."""
    state = {k: v.contiguous() for k, v in loaded.network.state_dict().items() if not _repeated(k)}
    return save_safetensors(state, {"family": family, "facts": json.dumps(loaded.facts, sort_keys=True)})


def unpack(content: bytes) -> tuple[str, Loaded]:
    """The reverse of ``pack``: family, and the network, bit for bit.

    Raises:
        CheckpointError: not a file of ``pack``.
    """
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        family, facts = header["__metadata__"]["family"], json.loads(header["__metadata__"]["facts"])
        state = load_safetensors(content)
        network = _empty(lambda: FAMILIES[family].build(facts))
        for name in network.state_dict():
            if _repeated(name):
                state[name] = state[name.replace("package.lins.", "package.lin")]
        return family, Loaded(_filled(network, state), facts)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"not a network of the model store: {error}") from error


def _repeated(name: str) -> bool:
    return name.startswith("package.lins.")  # LPIPS's package names these tensors twice


# -- StyleGAN2


def _stylegan2(facts: Mapping[str, Any]) -> nn.Module:
    return stylegan2.StyleGAN2(facts["size"], facts["multiplier"], facts["mapping_layers"], facts["layout"])


def _take_stylegan2(value: Any) -> tuple[State, dict[str, Any], list[str]]:
    theirs = _one_of(value, [("G_ema", ""), ("", ""), ("state_dict", "")], "synthesis.b4.const")
    if theirs:
        return _take_nvidia(theirs)
    places = [("g_ema", ""), ("state_dict", "decoder."), ("", ""), ("", "decoder."), ("g", "")]
    found = _one_of(value, places, "input.input")
    if not found:
        if any(isinstance(v, Skipped) and "dnnlib.tflib" in v.name for v in _all(value)):
            raise CheckpointError("a TensorFlow file (stylegan2-*.pkl of 2020); its PyTorch conversion is needed")
        raise CheckpointError("no StyleGAN2 generator in this file: neither g_ema nor G_ema nor decoder.*")
    notes = []
    blocks = _count_of(found, "to_rgbs.", 8)
    size = 4 << blocks
    multiplier = 2
    if size >= 64:
        at64 = found.get("convs.6.conv.weight")
        multiplier = 1 if at64 is not None and len(at64.shape) == 5 and at64.shape[1] == 256 else 2
    facts = {
        "size": size,
        "multiplier": multiplier,
        "mapping_layers": max(1, _count_of(found, "style.", 64, first=1)),
        "layout": stylegan2.ROSINALITY,
    }
    shapes = _shapes(_empty(lambda: _stylegan2(facts)), ["mean_code"])
    if not any(name.startswith("noises.") for name in found):
        # Maps of a seed of ours: repeatable, where the reference draws new ones for every picture.
        rng = torch.Generator().manual_seed(0)
        found = found | {n: torch.randn(s, generator=rng) for n, s in shapes.items() if n.startswith("noises.")}
        notes.append("the file has no noise maps: drawn here, seed 0")
    state = _fit(found, shapes, f"StyleGAN2 at {size} px (rosinality's layout)")
    _same_kernels(state, {n: 1.0 for n in shapes if n.endswith(".kernel")})
    mean = _inside(value, "latent_avg")
    if isinstance(mean, Tensor | TensorRef) and tuple(mean.shape[-1:]) == (512,) and len(mean.shape) in (1, 2):
        mean = _read(mean).reshape(-1, 512)
        state["mean_code"] = mean[0].contiguous()
    else:
        mapping = _filled(_empty(lambda: _stylegan2(facts)), state | {"mean_code": torch.zeros(512)}).mapping
        state["mean_code"] = w_space.spread(mapping)[0]
        notes.append("the file has no latent_avg: the mean of 4096 codes of seed 0 is taken")
    return state, facts, notes


def _take_nvidia(found: dict[str, Entry]) -> tuple[State, dict[str, Any], list[str]]:
    if any(name.startswith("mapping.embed.") for name in found):
        raise CheckpointError("a generator with class labels: not supported")
    sizes = [4 << i for i in range(9) if f"synthesis.b{4 << i}.torgb.weight" in found]
    size = max(sizes, default=4)
    at64 = found.get("synthesis.b64.conv1.weight")
    facts = {
        "size": size,
        "multiplier": 1 if at64 is not None and tuple(at64.shape[:1]) == (256,) else 2,
        "mapping_layers": max(1, _count_of(found, "mapping.fc", 64)),
        "layout": stylegan2.NVIDIA,
    }
    ours = _shapes(_empty(lambda: _stylegan2(facts)))
    names = stylegan2.nvidia_names(size, facts["mapping_layers"])
    filters = dict.fromkeys(stylegan2.nvidia_filters(size), (4, 4))
    wanted = {theirs: stylegan2.nvidia_shape(name, ours[name]) for theirs, name in names.items()} | filters
    state = _fit(found, wanted, f"StyleGAN2 at {size} px (NVIDIA's layout)")
    _same_kernels(state, dict.fromkeys(filters, 0.25))
    return stylegan2.from_nvidia(state, size, facts["mapping_layers"]), facts, []


def _same_kernels(state: State, scales: Mapping[str, float]) -> None:
    kernel = stylegan2.blur_kernel()
    for name, scale in scales.items():
        if not torch.equal(state[name], kernel * scale):
            raise CheckpointError(f"{name} is not the [1, 3, 3, 1] kernel that published files have")


def _give_stylegan2(network: nn.Module) -> State:
    state = dict(network.state_dict())
    if network.layout == stylegan2.NVIDIA:
        return stylegan2.to_nvidia(state, network.resolution, network.mapping_layers)
    del state["mean_code"]
    return state


def _count_of(found: Mapping[str, Any], prefix: str, limit: int, first: int = 0) -> int:
    """How many of PREFIX0..., PREFIX1... follow each other."""
    numbers = {name[len(prefix) :].split(".")[0] for name in found if name.startswith(prefix)}
    count = 0
    while count < limit and str(first + count) in numbers:
        count += 1
    return count


def _all(value: Any) -> list[Any]:
    inner = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else []
    return [value, *list(inner)[:64]]


# -- e4e


def _e4e(facts: Mapping[str, Any]) -> nn.Module:

    return E4E(facts["size"])


def _take_e4e(value: Any) -> tuple[State, dict[str, Any], list[str]]:
    found = _one_of(value, [("state_dict", "encoder."), ("", "encoder."), ("", "")], "latlayer1.weight")
    if not found:
        raise CheckpointError("no e4e encoder in this file: no entries encoder.* with a latlayer1")
    codes = _count_of(found, "styles.", 32)
    if codes < 2 or codes % 2 or codes > 18:
        raise CheckpointError(
            f"an encoder with {codes} style heads: e4e has 2 to 18, two for each doubling of the generator"
        )
    facts = {"size": 1 << (codes + 2) // 2}
    shapes = _shapes(_empty(lambda: _e4e(facts)), ["latent_avg", "std_code"])
    state = _fit(found, shapes, f"e4e for {facts['size']} px ({codes} codes)")
    notes = []
    mean = _inside(value, "latent_avg")
    options = _inside(value, "opts")
    starts = _inside(vars(options) if isinstance(options, argparse.Namespace) else options, "start_from_latent_avg")
    if isinstance(mean, Tensor | TensorRef):
        if tuple(mean.shape) not in ((codes, 512), (512,), (1, 512)):
            raise CheckpointError(f"latent_avg is {tuple(mean.shape)} instead of {(codes, 512)}")
        state["latent_avg"] = _read(mean).expand(codes, 512).contiguous()
    elif starts:
        raise CheckpointError("the options say start_from_latent_avg, but the file has no latent_avg")
    else:
        state["latent_avg"] = torch.zeros(codes, 512)
        notes.append("the file has no latent_avg: codes are the network's own output")
    state["std_code"] = torch.ones(512)
    decoder = decoder_of(value)
    if decoder is None:
        notes.append("the file has no decoder: its W space is not known")
    else:
        state["std_code"] = w_space.spread(decoder)[1].clamp_min(1e-6)
    return state, facts, notes


def decoder_of(value: Any) -> nn.Module | None:
    """The mapping network of the generator that an e4e file brings along; None where it has none that fits."""
    found = _one_of(value, [("state_dict", "decoder."), ("", "decoder.")], "style.1.weight")
    layers = _count_of(found, "style.", 64, first=1)
    if not layers:
        return None
    mapping = _empty(lambda: stylegan2.StyleGAN2(4, 2, layers)).style
    own = {name[len("style.") :]: item for name, item in found.items() if name.startswith("style.")}
    return _filled(mapping, _fit(own, _shapes(mapping), "the decoder's mapping network"))


def _give_e4e(network: nn.Module) -> State:
    return {k: v for k, v in network.state_dict().items() if k not in ("latent_avg", "std_code")}


# -- recognisers


def _give_network(network: nn.Module) -> State:
    return dict(network.network.state_dict())


def _take_network(
    value: Any,
    make: Callable[[Mapping[str, Any]], nn.Module],
    sample: str,
    what: str,
    facts_of: Callable[[Mapping[str, Entry]], dict[str, Any]],
) -> tuple[State, dict[str, Any], list[str]]:
    places = [(key, prefix) for key in ("", "state_dict", "model", "net") for prefix in ("", "module.")]
    found = _one_of(value, places, sample)
    if not found:
        raise CheckpointError(f"no {what} in this file: no entry {sample}")
    facts = facts_of(found)
    counters = {k: v for k, v in _shapes(_empty(lambda: make(facts))).items() if k.endswith("num_batches_tracked")}
    # Files of PyTorch before 0.4.1 do not have the counters; they play no part in eval mode.
    zeros = {k[8:]: torch.zeros((), dtype=torch.int64) for k in counters if k[8:] not in found}
    notes = ["the file has no batch counters (older than PyTorch 0.4.1)"] if zeros else []
    shapes = {k.removeprefix("network."): v for k, v in _shapes(_empty(lambda: make(facts))).items()}
    state = _fit({**found, **zeros}, shapes, what)
    return {f"network.{k}": v for k, v in state.items()}, facts, notes


def _positions(found: Mapping[str, Entry]) -> int:
    shape = getattr(found.get("output_layer.3.weight"), "shape", ())
    positions = shape[1] // 512 if len(shape) == 2 else 0
    return positions if 0 < positions <= 1024 else 49


def _irse50(facts: Mapping[str, Any]) -> nn.Module:

    return IRSE50(facts["positions"], facts["affine"])


def _ir152(facts: Mapping[str, Any]) -> nn.Module:

    return IR152(facts["positions"])


def _mobilefacenet(facts: Mapping[str, Any]) -> nn.Module:

    return MobileFaceNet512()


def _facenet(facts: Mapping[str, Any]) -> nn.Module:

    return (FaceNetCasia if facts["classes"] == 10575 else FaceNet)(facts["classes"])


def _classes(found: Mapping[str, Entry]) -> dict[str, Any]:
    shape = getattr(found.get("logits.weight"), "shape", None)
    if shape is not None and (len(shape) != 2 or shape[0] > 1_000_000):
        raise CheckpointError(f"logits.weight is {tuple(shape)}")
    return {"classes": None if shape is None else int(shape[0])}


# -- LPIPS


def _lpips(net: str) -> Callable[[Mapping[str, Any]], nn.Module]:
    def make(facts: Mapping[str, Any]) -> nn.Module:

        return LPIPSDistance(net)

    return make


def _take_lpips(net: str) -> Callable[[Any], tuple[State, dict[str, Any], list[str]]]:
    """Of torchvision's own file (``features.N.*``; the classifier is left) or of a whole LPIPS ``state_dict``."""

    def take(value: Any) -> tuple[State, dict[str, Any], list[str]]:
        shapes = {k.removeprefix("package."): v for k, v in _shapes(_empty(lambda: _lpips(net)({}))).items()}
        shapes = {k: v for k, v in shapes.items() if not k.startswith("lins.")}
        backbone = [k for k in shapes if k.startswith("net.")]
        what, notes = f"LPIPS ({net})", []
        whole = _one_of(value, [("", ""), ("state_dict", "")], backbone[0])
        if whole:
            whole = {k: v for k, v in whole.items() if not k.startswith("lins.")}
            state = _fit(whole, shapes, what)
        else:
            # net.sliceK.N.* is features.N.* of torchvision.
            names = {f"features.{k.split('.', 2)[2]}": k for k in backbone}
            found = _one_of(value, [("", ""), ("state_dict", "")], next(iter(names)))
            found = {k: v for k, v in found.items() if not k.startswith("classifier.")}
            if not found:
                raise CheckpointError(
                    f"no backbone of {what} in this file: neither {next(iter(names))} nor {backbone[0]}"
                )
            read = _fit(found, {k: shapes[v] for k, v in names.items()}, f"the backbone of {what}")
            state = {names[k]: v for k, v in read.items()} | package_lin(net) | _scaling()
            notes.append("linear layers: those of the package lpips 0.1.4")
        _same_scaling(state)
        own = {f"package.{k}": v for k, v in state.items()}
        own |= {f"package.lins.{k[3:]}": v for k, v in state.items() if k.startswith("lin")}
        return own, {}, notes

    return take


def package_lin(net: str) -> State:
    """The linear layers that the package lpips ships, their digest checked.

    Raises:
        WeightsError: the package is not installed, or its file is another.
    """


    spec = importlib.util.find_spec("lpips")
    if spec is None or spec.origin is None:
        raise WeightsError("the package lpips is not installed (pip install lpips==0.1.4)")
    content = read_checked(Path(spec.origin).parent / "weights" / "v0.1" / f"{net}.pth", LINEAR_SHA256[net])
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _scaling() -> State:
    return {
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1),
    }


def _same_scaling(state: State) -> None:
    for name, value in _scaling().items():
        if not torch.equal(state[name], value):
            raise CheckpointError(f"{name} is not LPIPS 0.1's")


def _give_lpips(network: nn.Module) -> State:
    return {k.removeprefix("package."): v for k, v in network.state_dict().items() if not _repeated(k)}


FAMILIES: dict[str, Family] = {
    "stylegan2": Family(_stylegan2, _take_stylegan2, _give_stylegan2),
    "e4e": Family(_e4e, _take_e4e, _give_e4e),
    "facenet": Family(
        _facenet, lambda v: _take_network(v, _facenet, "last_linear.weight", "FaceNet", _classes), _give_network
    ),
    "irse50": Family(
        _irse50,
        lambda v: _take_network(
            v,
            _irse50,
            "output_layer.3.weight",
            "IR-SE50",
            lambda f: {"positions": _positions(f), "affine": "output_layer.4.weight" in f},
        ),
        _give_network,
    ),
    "ir152": Family(
        _ir152,
        lambda v: _take_network(
            v, _ir152, "output_layer.3.weight", "IR152", lambda f: {"positions": _positions(f)}
        ),
        _give_network,
    ),
    "mobilefacenet-512": Family(
        _mobilefacenet,
        lambda v: _take_network(
            v, _mobilefacenet, "conv_6_dw.conv.weight", "MobileFaceNet (512)", lambda f: {}
        ),
        _give_network,
    ),
    "lpips-vgg": Family(_lpips("vgg"), _take_lpips("vgg"), _give_lpips),
    "lpips-alex": Family(_lpips("alex"), _take_lpips("alex"), _give_lpips),
}
