"""Recognisers and LPIPS of the model store take part by their names; here with numbers drawn at random."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipelines.evaluate import job, judges, measure
from pipelines.evaluate.errors import EvaluateError
from pipelines.evaluate.measure import Gallery, Measurer, Settings, Window, face_schema
from pipelines.evaluate.summary import Collector, Judge
from pipelines.jobs.demo import draw_person
from pipelines.networks.store import ModelStore
from scol_ops.metrics import to_uint8
from scol_ops.models import catalogue as public_models
from scol_ops.models import checkpoints
from scol_ops.models.lpips_distance import LPIPSDistance
from scol_ops.models.mobilefacenet512 import MobileFaceNet512


def add(store: ModelStore, folder: Path, name: str, network: torch.nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            module.running_var.uniform_(0.5, 1.5)
    torch.save(checkpoints.to_public(name, network), folder / f"{name}.pth")
    store.add(name, str(folder / f"{name}.pth"))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("added")
    found = ModelStore(str(folder / "store"))
    torch.manual_seed(0)
    add(found, folder, "mobilefacenet-512", MobileFaceNet512())
    with pytest.MonkeyPatch.context() as patch:  # the published file's digest, which these numbers do not have
        patch.setitem(public_models.CARDS, "lpips-alex", replace(public_models.CARDS["lpips-alex"], sha256=None))
        add(found, folder, "lpips-alex", LPIPSDistance("alex"))
    return found.url


def test_they_are_found(store, tmp_path):
    empty = str(tmp_path / "empty")
    assert judges.available(store) == (*judges.available(empty), "mobilefacenet-512")
    assert judges.lpips_name(store) == "lpips-alex" and judges.lpips_name(empty) is None
    job.check_settings(["mobilefacenet-512"], [], store)
    with pytest.raises(EvaluateError, match="mobilefacenet-512"):
        job.check_settings(["mobilefacenet-512"], [], empty)
    assert (
        judges.fingerprint("mobilefacenet-512", store)
        == judges.load("mobilefacenet-512", store=store).fingerprint
        != ""
    )


def test_they_measure(store, tmp_path):
    settings = Settings(("mobilefacenet", "mobilefacenet-512"), ("jpeg75",), lpips="lpips-alex", store=store)
    eyes = measure._eyes(settings)
    urls = []
    for name, person in (("one", 15), ("two", 10)):
        out = io.BytesIO()
        Image.fromarray(draw_person(person, 0, 256)).resize((200, 200), Image.Resampling.BOX).save(out, "PNG")
        (tmp_path / f"{name}.png").write_bytes(out.getvalue())
        urls.append(str(tmp_path / f"{name}.png"))
    pixels = np.asarray(Image.open(urls[1]))
    gallery = Gallery(["b"], [urls[1]], eyes.embed([Window.about(pixels, eyes.faces(pixels)[0])]))
    row = {
        "key": "0" * 32,
        "photo_id": "f" * 16,
        "path": "a/one.png",
        "url": urls[0],
        "protected_path": "a/one.png",
        "protected_url": urls[1],
        "person_id": "a",
        "mates": [],
        "status": "ok",
        "reason": None,
    }
    (found,) = Measurer(settings, eyes, gallery).photo(row)
    assert -1 <= found["ism_mobilefacenet-512"] <= 1 and found["unprotected_ism_mobilefacenet-512"] == pytest.approx(
        1, abs=1e-5
    )
    one, two = (torch.from_numpy(np.array(Image.open(u))).permute(2, 0, 1)[None].float() / 127.5 - 1 for u in urls)
    with torch.no_grad():
        expected = float(judges.load_lpips("lpips-alex", store=store)(one, two))
    assert (
        found["photo_lpips"] == pytest.approx(expected, rel=1e-4) and found["lpips"] > 0 and found["lpips@jpeg75"] > 0
    )
    assert np.array_equal(to_uint8(one)[0], np.asarray(Image.open(urls[0])))

    schema = face_schema(settings)
    table = pa.table([pa.array([found.get(f.name)], f.type) for f in schema], schema=schema)
    chosen = [Judge(n, "", 0.3, {1e-2: None, 1e-3: None}, 0, False) for n in settings.recognisers]
    collector = Collector(settings, chosen, 1, 9)
    collector.add(table)
    summary = collector.summary()
    assert summary.picture["lpips"]["jpeg75"].value == pytest.approx(found["lpips@jpeg75"], rel=1e-5)
    assert summary.picture["photo_lpips"]["none"].n == 1 and "mobilefacenet-512" in summary.identity


def test_without_lpips_there_is_no_column():
    names = face_schema(Settings(("faceres",), ())).names
    assert not [n for n in names if "lpips" in n]
