"""The whole job with public networks: StyleGAN2 of 64 px and its e4e, filled by the golden recipe, L = 10."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from gallery_index import GalleryMismatchError
from pipelines.config.load import ConfigError, load_config
from pipelines.config.names import STAGES
from pipelines.jobs import run_gallery
from pipelines.jobs.protect import protect
from pipelines.networks import fingerprints
from pipelines.networks import resolve as resolving
from pipelines.networks.store import MissingModelError, ModelStore
from pipelines.run.folder import Run
from pipelines.run.tables import read_stage
from scol_ops.models import checkpoints
from scol_ops.models.embedded import load_mobilestylegan
from scol_ops.models.stylegan2 import StyleGAN2
from tests.helpers import fabricate

MODELS = Path(__file__).parent / "models"


def _load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = _load("golden_recipe", MODELS / "golden" / "recipe.py")


def filled(name: str, wanted: Callable[[str], bool] = lambda entry: True) -> dict[str, torch.Tensor]:
    """A state dict of the golden vectors' recipe; what the recipe leaves is the network's own."""
    spec = json.loads((MODELS / "golden" / f"{name}.json").read_text())
    own = checkpoints.to_public("stylegan2", StyleGAN2(64)) if name == "stylegan2_64" else {}
    return {
        n: own[n]
        if (value := recipe.fill(n, shape, kind, spec["seed"])) is None
        else torch.from_numpy(np.asarray(value))
        for n, shape, kind in spec["state_dict"]
        if wanted(n)
    }


def e4e_64() -> dict[str, torch.Tensor]:
    """The recipe's e4e of 256 px with ten heads: an encoder for 64 px has the same entries but fewer of them."""
    return filled("e4e_256", lambda entry: not entry.startswith("styles.") or int(entry.split(".")[1]) < 10)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ModelStore:
    """A store with both, added from files in the published layouts by the command."""
    from pipelines.cli.main import main

    folder = tmp_path_factory.mktemp("models")
    generator = filled("stylegan2_64")
    mean = StyleGAN2(64).eval()
    mean.load_state_dict(generator | {"mean_code": torch.zeros(512)})
    with torch.no_grad():
        average = mean.mapping(torch.randn(256, 512, generator=torch.Generator().manual_seed(0))).mean(0)
    (folder / "g.pt").write_bytes(fabricate.torch_file({"g_ema": generator, "latent_avg": average}))
    # The recipe's offsets are small beside its W, as a trained encoder's are beside the mean.
    (folder / "e.pt").write_bytes(fabricate.e4e_file(e4e_64(), average.repeat(10, 1), generator, size=64))
    url = str(folder / "store")
    for name, file in (("stylegan2-64", "g.pt"), ("e4e-64", "e.pt")):
        result = CliRunner().invoke(main, ["models", "add", name, str(folder / file), "--store", url])
        assert result.exit_code == 0, result.output
        assert "fingerprint" in result.output and "licence" in result.output
    for file in ("g.pt", "e.pt"):
        (folder / file).unlink()
    return ModelStore(url)


def settings(store: ModelStore, *more: str):
    few = ["tune.steps=1", "refine.steps=1", "attack.enabled=true", "attack.steps=1", "gallery.synthetic=24"]
    few += ["fuse.k=3", "engine.workers=1", "engine.threads=1", "engine.device=cpu", "tune.bf16=false"]
    few += ["generator=stylegan2-64", "encoder=e4e-64"]
    return load_config("quick", sets=[*few, f"engine.models={store.url}", *more])


def test_five_stages_of_ten_codes(ray_cluster, store: ModelStore, draw_photo, tmp_path: Path) -> None:
    src, out = tmp_path / "photos", tmp_path / "out"
    src.mkdir()
    Image.fromarray(draw_photo([100])).save(src / "one.png")
    result = protect(str(src), str(out), settings(store, "tune.identity=encoder,mobilefacenet"))
    assert (result["photos"], result["faces"], result["error"], result["pending"]) == (1, 1, 0, 0)
    run = Run(f"{out}.run")
    rows = {stage: read_stage(run, stage).to_pylist() for stage in STAGES if stage != "strengthen"}
    assert all(len(found) == 1 and found[0]["status"] in ("ok", "weak") for found in rows.values())
    invert, fuse, attack = (rows[stage][0] for stage in ("invert", "fuse", "attack"))
    assert len(invert["code"]) == len(fuse["fused"]) == len(fuse["target"]) == 10 * 512
    assert len(fuse["least_scores"]) == 10 and math.isfinite(attack["loss_after"])
    assert "stylegan2-64:" in invert["weights"] and "e4e-64:" in attack["weights"]
    record = run.read_json("run.json")
    assert record["config"]["generator"] == "stylegan2-64" and record["config"]["engine"]["models"] == store.url
    assert (np.asarray(Image.open(out / "one.png")) != np.asarray(Image.open(src / "one.png"))).any()


def test_w_spaces_must_agree_and_both_are_named(store: ModelStore, tmp_path: Path) -> None:
    """The same entries, other numbers in the mapping network: another W, so the encoder's codes mean nothing to it."""
    other = ModelStore(str(tmp_path / "store"))
    state = filled("stylegan2_64")
    for i in range(1, 9):
        state[f"style.{i}.weight"] = state[f"style.{i}.weight"].flip(0)
    (tmp_path / "other.pt").write_bytes(fabricate.torch_file({"g_ema": state, "latent_avg": torch.zeros(512)}))
    other.add("stylegan2-64", str(tmp_path / "other.pt"))
    for file in ("e4e-64.json", "e4e-64.safetensors"):
        (Path(other.url) / file).symlink_to(Path(store.url) / file)
    with pytest.raises(ConfigError, match=r"'stylegan2-64' \(from other.pt\) and encoder 'e4e-64' \(from e.pt\)"):
        resolving.resolve(settings(other))
    assert resolving.resolve(settings(store)).engine.models == store.url
    first, second = (place.record("stylegan2-64").w_fingerprint for place in (store, other))
    assert first != second and store.record("e4e-64").w_fingerprint == first


def test_missing_models_are_told_before_anything_runs(store: ModelStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'stylegan2-64' takes 10 codes, encoder 'embedded' gives 16"):
        settings(store, "encoder=embedded")
    empty = ModelStore(str(tmp_path / "none"))
    src = tmp_path / "photos"
    src.mkdir()
    with pytest.raises(
        MissingModelError, match="github.com/NVlabs.*licence: NVIDIA.*scol models add stylegan2-64 FILE"
    ):
        protect(str(src), str(tmp_path / "out"), settings(empty))
    assert not (tmp_path / "out.run").exists() and not (tmp_path / "out").exists()


def test_mobilestylegan_and_stylegan2_of_one_w_share_a_gallery(store: ModelStore, draw_photo, tmp_path: Path) -> None:
    """A StyleGAN2 file whose mapping network is MobileStyleGAN's, as FFHQ's is said to be: the same W, one gallery."""
    mobile = load_mobilestylegan(256, head=None)
    network = StyleGAN2(64)
    state = {k: v.detach().clone() for k, v in checkpoints.to_public("stylegan2", network).items()}
    for i, layer in enumerate(mobile.mapping.layers):
        # stored so that the equalised learning rate gives back what is in effect
        state[f"style.{i + 1}.weight"] = layer.weight / (0.01 / math.sqrt(512))
        state[f"style.{i + 1}.bias"] = layer.bias / 0.01
    place = ModelStore(str(tmp_path / "store"))
    (tmp_path / "ffhq.pt").write_bytes(fabricate.torch_file({"g_ema": state, "latent_avg": mobile.mean_code}))
    record, sheet = place.add("stylegan2-64", str(tmp_path / "ffhq.pt"))
    assert record.w_fingerprint == fingerprints.mapping_fingerprint() and sheet.startswith(b"\x89PNG")
    assert store.record("stylegan2-64").w_fingerprint != record.w_fingerprint

    z = torch.randn(8, 512, generator=torch.Generator().manual_seed(3))
    ours, theirs = place.load("stylegan2-64").network.mapping(z), mobile.mapping(z)
    assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())

    # A gallery that MobileStyleGAN made (L = 16) fits a run of ten codes of the same W, and no run of another W.
    url = str(tmp_path / "gallery")
    run_gallery.build_synthetic(url, load_config(sets=["gallery.synthetic=64"]))
    (Path(place.url) / "e4e-64.safetensors").symlink_to(Path(store.url) / "e4e-64.safetensors")
    encoder = json.loads((Path(store.url) / "e4e-64.json").read_text())
    encoder["w_probe"], encoder["w_fingerprint"] = record.w_probe, record.w_fingerprint
    (Path(place.url) / "e4e-64.json").write_text(json.dumps(encoder))
    shared = resolving.resolve(settings(place, f"gallery.url={url}"))
    info = run_gallery.RunGallery.open(shared, Run(str(tmp_path / "run")), print).info
    assert (info.layers, info.count) == (16, 64)
    from gallery_index import Gallery

    gallery = Gallery.load(url, layers=shared.num_codes)
    code = ours[:1, None].expand(1, 10, -1).detach().numpy()
    found = gallery.search(code, 3)
    assert found.most_vectors.shape[1:] == (10, 3, 512) or found.most_vectors.shape[2] == 10
    assert found.least_vectors.shape == (1, 10, 512)
    with pytest.raises(GalleryMismatchError, match="generator's fingerprint"):
        run_gallery.RunGallery.open(
            resolving.resolve(settings(store, f"gallery.url={url}")), Run(str(tmp_path / "r2")), print
        )
