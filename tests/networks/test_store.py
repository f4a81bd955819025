"""The model store: what is added is checked, found again bit for bit, verified, told, and removed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from click.testing import CliRunner

from pipelines.config.load import load_config
from pipelines.config.names import EMBEDDED_CODES, GENERATORS
from pipelines.networks import fingerprints
from pipelines.networks import load as networks
from pipelines.networks import resolve as resolving
from pipelines.networks.store import MissingModelError, ModelStore, ModelStoreError, default_url
from scol_ops.losses import reconstruction_loss
from scol_ops.models import catalogue as public_models
from scol_ops.models import checkpoints
from scol_ops.models.lpips_distance import LPIPSDistance
from scol_ops.models.mobilefacenet512 import MobileFaceNet512
from scol_ops.models.recognisers import Recogniser, ffhq_mean_geometry
from scol_ops.models.stylegan2 import StyleGAN2
from tests.helpers.fabricate import nvidia_pickle, torch_file
from tests.helpers.s3_server import Fault


def scol(*arguments: str):
    from pipelines.cli.main import main

    return CliRunner().invoke(main, list(arguments))


def face_file(seed: int = 0) -> bytes:
    torch.manual_seed(seed)
    network = MobileFaceNet512()
    for module in network.modules():  # running statistics as after training, so that embeddings are no zeros
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            module.running_var.uniform_(0.5, 1.5)
    return torch_file(checkpoints.to_public("mobilefacenet-512", network), old=True)


@pytest.fixture
def place(tmp_path: Path) -> ModelStore:
    (tmp_path / "mobile_face.pth").write_bytes(face_file())
    store = ModelStore(str(tmp_path / "store"))
    store.add("mobilefacenet-512", str(tmp_path / "mobile_face.pth"))
    return store


def test_added_models_come_back(place: ModelStore, tmp_path: Path) -> None:
    record = place.record("mobilefacenet-512")
    assert place.names() == ["mobilefacenet-512"] and record.family == "mobilefacenet-512"
    assert record.source_sha256 == hashlib.sha256((tmp_path / "mobile_face.pth").read_bytes()).hexdigest()
    assert record.layout == "stream" and not record.skipped and record.digest == "unknown"
    assert 0 < record.check["cosine_same_blurred"] <= 1
    public = checkpoints.read_checkpoint((tmp_path / "mobile_face.pth").read_bytes()).value
    stored = checkpoints.to_public("mobilefacenet-512", place.load("mobilefacenet-512").network)
    assert stored.keys() == public.keys() and all(torch.equal(stored[k], public[k]) for k in stored)

    network = networks.recogniser("mobilefacenet-512", torch.device("cpu"), place.url)
    assert isinstance(network, Recogniser) and network.fingerprint == record.fingerprint
    faces = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    embeddings = network.embed_crops(faces, *ffhq_mean_geometry(2, 128))
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    embeddings[0, 0].backward()
    assert faces.grad.abs().max() > 0


def test_altered_models_are_refused(place: ModelStore) -> None:
    path = Path(place.url) / "mobilefacenet-512.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelStoreError, match="its record says .*: refused"):
        place.load("mobilefacenet-512")
    result = scol("models", "verify", "--store", place.url)
    assert result.exit_code == 1 and "FAIL mobilefacenet-512" in result.output


def test_commands(place: ModelStore, tmp_path: Path) -> None:
    listed = json.loads(scol("models", "list", "--json", "--store", place.url).output)
    assert {row["name"]: row["there"] for row in listed["models"]}["mobilefacenet-512"]
    assert len(listed["models"]) == len(public_models.CARDS) and listed["store"] == place.url
    shown = scol("models", "info", "mobilefacenet-512", "--store", place.url).output
    assert "Clip2Protect" in shown and "MIT" in shown and place.record("mobilefacenet-512").fingerprint in shown
    assert "scol models add e4e-1024 FILE" in scol("models", "info", "e4e-1024", "--store", place.url).output
    verified = scol("models", "verify", "--store", place.url)
    assert verified.exit_code == 0 and "ok   mobilefacenet-512" in verified.output
    assert scol("models", "remove", "mobilefacenet-512", "--store", place.url).exit_code == 0
    assert place.names() == [] and not list(Path(place.url).iterdir())
    gone = scol("models", "remove", "mobilefacenet-512", "--store", place.url)
    assert gone.exit_code == 2 and "is not in the model store" in gone.output
    wrong = scol("models", "add", "stylegan3", str(tmp_path / "mobile_face.pth"), "--store", place.url)
    assert wrong.exit_code == 2 and "unknown model 'stylegan3'" in wrong.output and "Traceback" not in wrong.output
    wrong = scol("models", "add", "irse50", str(tmp_path / "mobile_face.pth"), "--store", place.url)
    assert wrong.exit_code == 2 and "no IR-SE50 in this file" in wrong.output
    wrong = scol("models", "add", "irse50", str(tmp_path / "none.pth"), "--store", place.url)
    assert wrong.exit_code == 2 and "cannot read" in wrong.output
    assert place.names() == []


def test_a_store_may_be_a_url(tmp_path: Path) -> None:
    (tmp_path / "face.pth").write_bytes(face_file())
    with fsspec.open("memory://inbox/mobile_face.pth", "wb") as stream:
        stream.write(face_file())
    store = ModelStore("memory://models-of-this-test")
    record, _ = store.add("mobilefacenet-512", "memory://inbox/mobile_face.pth")
    assert store.names() == ["mobilefacenet-512"] and store.load("mobilefacenet-512").facts == {}
    assert record.source == "mobile_face.pth"
    store.remove("mobilefacenet-512")
    assert store.names() == []


@pytest.mark.parametrize("kind", ["internal", "slow_down", "reset", "lost"])
def test_a_store_on_s3_survives_faults(s3, monkeypatch, kind: str) -> None:
    monkeypatch.setattr("cluster.retries.time.sleep", lambda seconds: None)
    store, data = ModelStore(f"{s3.root}/models"), bytes(range(256)) * 40
    with s3.failing(Fault(kind, "PUT", times=6)) as (fault,):
        store._write("irse50.json", data)
    assert fault.seen == 6
    if kind == "lost":  # of readings: the answer came by half
        kind = "cut"
    with s3.failing(Fault(kind, "GET", "irse50.json", times=6)):
        assert store.read("irse50.json") == data
    with s3.failing(Fault("short", "GET", "irse50.json", times=1)):
        assert store.read("irse50.json") == data, "half of a network is not taken for all of it"
    with s3.failing(Fault(kind, "GET", "list-type=2", times=6)):
        assert store.names() == ["irse50"] and not store.has("e4e-1024")
    with s3.failing(Fault(kind, "HEAD", times=6)):
        assert store.has("irse50"), "a fault does not look like a model that is missing"
    with s3.failing(Fault(kind, "DELETE", times=2)):
        store.remove("irse50")
    assert store.names() == []
    with s3.failing(Fault("denied", times=None)), pytest.raises(ModelStoreError):
        store.has("irse50")


def test_files_of_the_store_are_safe_on_the_disk_before_they_take_their_place(place: ModelStore, monkeypatch) -> None:
    before, record = place.content("mobilefacenet-512"), place.read("mobilefacenet-512.json")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelStoreError, match="No space left"):
        place._write("mobilefacenet-512.json", b"{}")
    assert place.content("mobilefacenet-512") == before and place.read("mobilefacenet-512.json") == record
    assert sorted(p.name for p in Path(place.url).iterdir()) == [
        "mobilefacenet-512.json",
        "mobilefacenet-512.safetensors",
    ]


def test_two_that_add_a_model_at_once_do_not_take_each_others_file(tmp_path: Path) -> None:
    barrier, failed = threading.Barrier(4), []

    def add(number: int) -> None:
        store = ModelStore(str(tmp_path))
        for _ in range(30):
            barrier.wait(60)
            try:
                store._write("irse50.json", bytes([number]) * 10_000)
            except ModelStoreError as error:
                failed.append(error)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = (tmp_path / "irse50.json").read_bytes()
    assert failed == [] and len(set(content)) == 1 and len(content) == 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["irse50.json"]


def test_the_variable_names_the_store(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SCOL_MODELS", str(tmp_path / "here"))
    assert default_url() == str(tmp_path / "here") and ModelStore().url == str(tmp_path / "here")
    monkeypatch.delenv("SCOL_MODELS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_url() == str(tmp_path / "scol" / "models")


def test_generators_in_nvidias_layout(tmp_path: Path) -> None:
    network = StyleGAN2(64, layout="nvidia", mapping_layers=2)
    network.mean_code.normal_()
    state = {k: v.detach().clone() for k, v in checkpoints.to_public("stylegan2", network).items()}
    (tmp_path / "ffhq.pkl").write_bytes(nvidia_pickle(state))
    store = ModelStore(str(tmp_path / "store"))
    with pytest.raises(ModelStoreError, match="ffhq.pkl has size 64, stylegan2-128 is 128"):
        store.add("stylegan2-128", str(tmp_path / "ffhq.pkl"))
    record, sheet = store.add("stylegan2-64", str(tmp_path / "ffhq.pkl"))
    assert record.facts["layout"] == "nvidia" and record.codes == 10 and record.layout == "pickle"
    assert "dnnlib.util.EasyDict" in record.skipped and sheet[:4] == b"\x89PNG"
    assert (Path(store.url) / "stylegan2-64.png").read_bytes() == sheet
    again = checkpoints.to_public("stylegan2", store.load("stylegan2-64").network)
    assert all(torch.equal(again[k], v) for k, v in state.items())
    state["mapping.fc0.weight"][0, 0] = float("nan")
    (tmp_path / "nan.pkl").write_bytes(nvidia_pickle(state))
    with pytest.raises(ModelStoreError, match="not finite"):
        store.add("stylegan2-64", str(tmp_path / "nan.pkl"))


def test_published_digests_are_checked(tmp_path: Path) -> None:
    (tmp_path / "vgg16-397923af.pth").write_bytes(torch_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}))
    with pytest.raises(ModelStoreError, match="the published file's begins with 397923af: refused"):
        ModelStore(str(tmp_path / "store")).add("lpips-vgg", str(tmp_path / "vgg16-397923af.pth"))


def test_lpips_is_the_tuning_loss_where_it_is_there(tmp_path: Path, monkeypatch) -> None:
    store = ModelStore(str(tmp_path / "store"))
    said: list[str] = []
    config = load_config(sets=["tune.perceptual=auto", f"engine.models={store.url}"])
    settled = resolving.resolve(config, said.append)
    assert settled.tune.perceptual == "ssim" and "LPIPS is not in the model store" in said[0]
    assert resolving.resolve(settled) == settled
    # the same key as of a run that never heard of LPIPS
    assert settled.canonical("tune") == load_config().canonical("tune")
    with pytest.raises(MissingModelError, match="alexnet-owt-7be5be79.pth"):
        resolving.resolve(load_config(sets=["tune.perceptual=lpips-alex", f"engine.models={store.url}"]))

    torch.manual_seed(0)
    network = LPIPSDistance("alex").eval()
    content = torch_file(checkpoints.to_public("lpips-alex", network))
    # Not torchvision's file, so the digest that is known of it does not count here.
    card = public_models.CARDS["lpips-alex"]
    monkeypatch.setitem(public_models.CARDS, "lpips-alex", type(card)(**{**vars(card), "sha256": None}))
    (tmp_path / "alex.pth").write_bytes(content)
    record, _ = store.add("lpips-alex", str(tmp_path / "alex.pth"))
    assert record.check["distance_self"] == 0 < record.check["distance_blurred"]
    settled = resolving.resolve(config, said.append)
    assert settled.tune.perceptual == "lpips-alex" and said[-1] == "tuning loss: lpips-alex"
    assert f"lpips-alex:{record.fingerprint}" in fingerprints.stage_weights(settled, "g")["tune"].split(",")
    assert settled.canonical("tune") != load_config().canonical("tune")

    # It steers: with LPIPS the tuning's reconstruction loss is L2 and LPIPS, and no SSIM.
    from scol_ops.models.embedded import load_mobilestylegan
    from scol_ops.tuning import tune
    from tests.helpers.operator_settings import TUNE

    generator = load_mobilestylegan(256)
    code = generator.mean_code.expand(1, 16, -1).contiguous()
    with torch.no_grad():
        face = generator(code + 0.2).clamp(-1, 1)
        first = generator(code)
    stored = networks.perceptual("lpips-alex", torch.device("cpu"), settled.engine.models)
    options = replace(TUNE, steps=1, parameters="late", lpips_weight=3.0, target_psnr=1000.0)
    done = tune(generator, code, face, torch.ones(1, 1, 256, 256), [], [], options, perceptual=stored)
    with torch.no_grad():
        expected = reconstruction_loss(first, face, options.l2_weight, 0.0) + 3.0 * stored(face, first).mean()
    assert done.history[0]["reconstruction"] == pytest.approx(float(expected), rel=1e-4)


def test_lpips_has_a_gradient_where_all_features_are_zero() -> None:
    network = LPIPSDistance("alex").eval().requires_grad_(False)
    for layer in network.package.net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.bias.fill_(-100.0)  # every ReLU is shut
    picture = torch.rand(1, 3, 64, 64, requires_grad=True)
    network(torch.zeros(1, 3, 64, 64), picture).sum().backward()
    assert torch.isfinite(picture.grad).all()


def test_cards_are_complete() -> None:
    for card in public_models.CARDS.values():
        assert card.family in checkpoints.FAMILIES and card.licence and card.published and card.file and card.instead
    for name, size in GENERATORS.items():
        encoder = "embedded" if name.startswith("mobile") else f"e4e-{size}"
        codes = load_config(sets=[f"generator={name}", f"encoder={encoder}"]).num_codes
        assert codes == (
            EMBEDDED_CODES if encoder == "embedded" else StyleGAN2(size).num_codes if size == 64 else codes
        )


def test_profile_paper() -> None:
    config = load_config("paper")
    assert (config.generator, config.encoder, config.num_codes, config.crop_size) == (
        "stylegan2-1024",
        "e4e-1024",
        18,
        1024,
    )
    assert (config.tune.id_lock, config.inspect.tau, config.attack.eps) == (1.0, 3.0, 8 / 255)
    assert config.tune.perceptual == "auto" and config.tune.identity == ("encoder",)


def test_a_judge_that_is_the_encoders_trunk_is_refused() -> None:
    from pipelines.config.load import ConfigError

    with pytest.raises(ConfigError, match="'irse50' is part of the encoder"):
        load_config("paper", sets=["publish.judge=irse50"])
    assert load_config("paper", sets=["publish.judge=ir152"]).publish.judge == "ir152"
    assert load_config(sets=["publish.judge=irse50"]).publish.judge == "irse50"
