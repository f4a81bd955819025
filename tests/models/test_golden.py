"""Every golden vector: weights by the recipe, through a file in the published layout, to the reference's outputs.

``SCOL_GOLDEN`` names another folder; every NAME.json in it is tested (golden/README.md says what they hold).
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scol_ops.models import checkpoints
from scol_ops.models.checkpoints import FAMILIES, Loaded
from scol_ops.models.stylegan2 import NVIDIA, ROSINALITY, blur_kernel
from tests.helpers.fabricate import e4e_file, nvidia_pickle, torch_file

OURS = Path(__file__).parent / "golden"
FOLDER = Path(os.environ.get("SCOL_GOLDEN") or OURS)
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
# Others of their family, in the same code, are smaller.
LONG = ("stylegan2_256", "e4e_1024")
_PLAIN = {
    "facenet": "facenet", "irse50": "irse50", "ir152": "ir152", "mobilefacenet": "mobilefacenet-512",
    "lpips_vgg": "lpips-vgg", "lpips_alex": "lpips-alex",
}  # fmt: skip

_spec = importlib.util.spec_from_file_location(
    "golden_recipe", FOLDER / "recipe.py" if (FOLDER / "recipe.py").exists() else OURS / "recipe.py"
)
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)


def family_of(name: str) -> tuple[str, dict[str, Any]]:
    """Family and the facts that the name gives."""
    sized = re.fullmatch(r"(stylegan2_ada|stylegan2|e4e)_(\d+)(_.*)?", name)
    if sized:
        size = int(sized[2])
        if sized[1] == "e4e":
            return "e4e", {"size": size}
        layout = NVIDIA if sized[1] == "stylegan2_ada" else ROSINALITY
        return "stylegan2", {"size": size, "layout": layout}
    for prefix, family in _PLAIN.items():
        if name == prefix or name.startswith(prefix + "_"):
            return family, {}
    pytest.fail(f"{name}: no network of that name")


def load_spec(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def consts(spec: dict[str, Any], name: str) -> Tensor:
    """An entry of kind ``const``: what the JSON says, else the kernel that every file has."""
    for patterns, value in spec.get("const_values", {}).items():
        for pattern in patterns.split(" and "):
            if re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace("N", r"\d+"), name):
                return torch.tensor(value)
    if name.endswith("resample_filter"):
        return blur_kernel() / 4
    if name.endswith(".kernel"):
        return blur_kernel()
    return {
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188]),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450]),
    }[name]


def filled(spec: dict[str, Any]) -> dict[str, Tensor]:
    state = {}
    for name, shape, kind in spec["state_dict"]:
        value = recipe.fill(name, shape, kind, spec["seed"])
        state[name] = consts(spec, name).reshape(shape) if value is None else torch.from_numpy(np.asarray(value))
    return state


def given(spec: dict[str, Any]) -> dict[str, Tensor]:
    return {
        i["name"]: torch.from_numpy(recipe.inputs(i["name"], i["shape"], i["kind"], i["seed"])) for i in spec["inputs"]
    }


def of_rank(inputs: dict[str, Tensor], name: str, rank: int) -> Tensor | None:
    """An input by its name, or by its dimensions where it has another name."""
    return inputs.get(name, next((x for x in inputs.values() if x.ndim == rank), None))


def published(name: str, family: str, state: dict[str, Tensor], inputs: dict[str, Tensor]) -> bytes:
    """A file as the network's owner would publish it."""
    if family == "stylegan2":
        if name.startswith("stylegan2_ada"):
            return nvidia_pickle(state)
        mean = of_rank(inputs, "latent_avg", 1)
        return torch_file({"g_ema": state, "latent_avg": torch.zeros(512) if mean is None else 0.5 * mean})
    if family == "e4e":
        codes = sum(k.endswith(".linear.weight") for k in state)
        return e4e_file(state, torch.linspace(-1, 1, codes * 512).reshape(codes, 512), namespace=codes < 16)
    return torch_file(state, old=family in ("irse50", "ir152", "facenet", "mobilefacenet-512"))


@torch.no_grad()
def outputs_of(family: str, loaded: Loaded, spec: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    network = loaded.network
    wanted = [output["name"] for output in spec["outputs"]]
    first = next(iter(inputs.values()))
    found: dict[str, Tensor] = {}
    if family == "stylegan2":
        z, wplus = of_rank(inputs, "z", 2), of_rank(inputs, "wplus", 3)

        def drawn(psi: float) -> Tensor:
            w = network.truncate(network.mapping(z[:1]), psi)
            return network(w[:, None].expand(-1, network.num_codes, -1))

        for output in wanted:
            psi = re.fullmatch(r"image_z_psi(\d)(\d+)", output)
            if output == "w":
                found[output] = network.mapping(z)
            elif output == "ws":
                found[output] = network.mapping(z)[:, None].expand(-1, network.num_codes, -1)
            elif output == "image":
                found[output] = network(wplus)
            elif output == "image_truncated":
                found[output] = drawn(0.7)
            elif output == "image_z":
                found[output] = drawn(1.0)
            elif psi:
                found[output] = drawn(float(f"{psi[1]}.{psi[2]}"))
    elif family == "e4e":
        for output in wanted:
            stage = re.fullmatch(r"w\w*_stage(\d+)", output)
            if output == "wplus":
                found[output] = network.offsets(first)
                assert torch.allclose(network(first), found[output] + network.latent_avg)
            elif stage:
                found[output] = network.offsets(first, int(stage[1]))
    elif family.startswith("lpips"):
        a, b = list(inputs.values())[:2]
        steps = {int(i): float(t) for t, i in re.findall(r"([\d.]+) for item (\d+)", spec["outputs"][0]["what"])}
        t = torch.tensor([steps.get(i, list(steps.values())[-1] if steps else 1.0) for i in range(len(a))])
        second = a + t.view(-1, 1, 1, 1) * (b - a)
        for output in wanted:
            if output == "distance":
                found[output] = network(a, second)[:, None]
            elif output == "per_layer":
                found[output] = network.per_layer(network.reference(a), second)
            elif output == "distance_near":
                found[output] = network(a, 0.9 * a + 0.1 * b)[:, None]
            elif output == "feature_stats":
                maps = [f.double() for f in network.features(a)]
                found[output] = torch.stack(
                    [torch.stack((f.mean((1, 2, 3)), f.std((1, 2, 3), correction=0)), 1) for f in maps], 1
                )
            elif output == "distance_package_lin":
                # a file of the backbone alone, as torchvision publishes it: the package's linear layers are taken
                backbone = {
                    f"features.{k.split('.', 2)[2]}": v
                    for k, v in checkpoints.to_public(family, network).items()
                    if k.startswith("net.")
                }
                backbone["classifier.6.weight"] = torch.zeros(3, 5)
                content = checkpoints.read_checkpoint(torch_file(backbone, old=True))
                found[output] = checkpoints.load_public(family, content.value).network(a, second)[:, None]
    else:
        inner: nn.Module = network.network
        kept: dict[str, Tensor] = {}
        last = {"facenet": "last_bn", "mobilefacenet-512": "bn"}.get(family, "output_layer.4")
        hook = inner.get_submodule(last).register_forward_hook(lambda m, i, o: kept.update(before_norm=o))
        # FaceNet's vectors feed the network itself, which the recogniser does after its own scaling.
        found["embedding"] = inner(first) if family in ("facenet", "ir152") else network.embed_aligned(first)
        hook.remove()
        found["before_norm"] = kept["before_norm"]
        if "logits" in wanted:
            inner.classify = True
            found["logits"] = inner(first)
            inner.classify = False
    missing = set(wanted) - set(found)
    assert not missing, f"outputs that this test does not know: {missing}"
    return found


def test_golden_recipe() -> None:
    import zlib

    assert zlib.crc32(recipe.fill("a", [64, 32, 3, 3], "conv", 0).tobytes()) == 0xD87C24E3
    assert zlib.crc32(recipe.inputs("image", [2, 3, 100, 77], "image", 0).tobytes()) == 0x27231583
    assert NAMES, f"no golden vectors in {FOLDER}"


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("_keys")])
def test_golden_keys(name: str) -> None:
    """Names and shapes of the published layout, of a network without numbers."""
    spec, (family, facts) = load_spec(name), family_of(name.removesuffix("_keys"))
    shapes = {n: tuple(shape) for n, shape, _ in spec["state_dict"]}
    at64 = shapes.get("convs.6.activate.bias") or shapes.get("synthesis.b64.conv0.bias") or (512,)
    mapping = [n for n in shapes if re.fullmatch(r"(style\.|mapping\.fc)\d+\.weight", n)]
    facts |= {"multiplier": at64[0] // 256, "mapping_layers": len(mapping), "affine": "output_layer.4.weight" in shapes}
    facts["positions"] = shapes.get("output_layer.3.weight", (0, 512 * 49))[1] // 512
    facts["classes"] = shapes["logits.weight"][0] if "logits.weight" in shapes else None
    with torch.device("meta"):
        network = FAMILIES[family].build(facts)
    assert {k: tuple(v.shape) for k, v in checkpoints.to_public(family, network).items()} == shapes
    if "parameters" in spec:
        assert sum(p.numel() for p in network.parameters()) == spec["parameters"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.long if n in LONG else ()) for n in NAMES if not n.endswith("_keys")],
)
def test_golden_vector(name: str) -> None:
    spec, (family, facts) = load_spec(name), family_of(name)
    inputs, state = given(spec), filled(spec)
    content = checkpoints.read_checkpoint(published(name, family, state, inputs))
    loaded = checkpoints.load_public(family, content.value)
    del content
    assert {k: loaded.facts[k] for k in facts} == facts, "another network than the name says"

    # both ways: the published layout and the store's own form give the same bits back
    def same(network: nn.Module) -> None:
        again = checkpoints.to_public(family, network)
        assert set(again) == set(state)
        assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in state.items())

    same(loaded.network)
    stored = checkpoints.pack(family, loaded)
    del loaded
    gc.collect()
    kind, loaded = checkpoints.unpack(stored)
    del stored
    assert kind == family
    same(loaded.network)
    del state

    expected = np.load(FOLDER / f"{name}.npz")
    found = outputs_of(family, loaded, spec, inputs)
    for output in spec["outputs"]:
        limit = output.get("tolerance", spec["tolerance"]["rel_max"])
        for stored in output["stored"]:
            gap = recipe.compare(recipe.pick(found[output["name"]].numpy(), stored["how"]), expected[stored["key"]])
            assert gap["rel_max"] <= limit, f"{stored['key']}: {gap['rel_max']:.2e} above {limit:.0e}"


def test_golden_names() -> None:
    assert family_of("stylegan2_ada_512") == ("stylegan2", {"size": 512, "layout": NVIDIA})
    assert family_of("stylegan2_32_other_seed")[1] == {"size": 32, "layout": ROSINALITY}
    assert family_of("lpips_vgg_odd")[0] == "lpips-vgg" and family_of("irse50_224")[0] == "irse50"
    assert family_of("e4e_64") == ("e4e", {"size": 64}) and family_of("mobilefacenet_x")[0] == "mobilefacenet-512"
    for name in ("stylegan3_64", "irse500", "e4e", "stylegan2_ada"):
        with pytest.raises(pytest.fail.Exception):
            family_of(name)
