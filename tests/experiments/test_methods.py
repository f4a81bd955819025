"""Trees made by the attacks, and methods side by side, on generated people."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.evaluate.measure import Eyes
from pipelines.evaluate.summary import AVERAGE
from pipelines.experiments import comparison
from pipelines.experiments.comparison import UNPROTECTED, compare, protection_table
from pipelines.experiments.methods import Method, box_mask, make, target_features
from pipelines.jobs.demo import draw_person
from pipelines.photos.codec import decode

pytestmark = pytest.mark.usefixtures("ray_cluster")

SEEDS = {"Ada": 15, "Ben": 10, "Cleo": 13, "Dan": 2}
SIDE = 220


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=93, subsampling=0)
    path.write_bytes(out.getvalue())


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    for person, seed in SEEDS.items():
        for variant, name in ((0, "originals"), (1, "gallery")):
            if name == "originals" and person == "Dan":
                continue
            image = Image.fromarray(draw_person(seed, variant, 256)).resize((SIDE, SIDE), Image.Resampling.BOX)
            write(folder / name / person / f"{variant}.jpg", np.asarray(image))
    (folder / "originals/Eve").mkdir()
    (folder / "originals/Eve/0.jpg").write_bytes(b"\xff\xd8\xff torn")
    return folder


@pytest.fixture(scope="module")
def lines(place) -> list[comparison.Line]:
    methods = [UNPROTECTED, Method("mi-fgsm", "attack", attack="mi-fgsm", eps=10 / 255, surrogates=("mobilefacenet",))]
    return compare(
        methods,
        place / "originals",
        place / "gallery",
        place / "work",
        recognisers=("mobilefacenet", "faceres"),
        distortions=(),
        references=10,
        workers=1,
    )


def test_an_attack_makes_a_tree(place, lines):
    made = lines[1].made
    assert made.tree == str(place / "work/trees/mi-fgsm") and made.seconds_per_face > 0
    assert list(made.failed) == ["Eve/0.jpg"] and "Eve" not in {p.parent.name for p in Path(made.tree).rglob("*.jpg")}
    eyes = Eyes(("mobilefacenet",))
    for person in ("Ada", "Ben", "Cleo"):
        before, after = (
            decode((root / person / "0.jpg").read_bytes()) for root in (place / "originals", Path(made.tree))
        )
        assert before.jpeg == after.jpeg  # the same tables and subsampling
        change = np.abs(after.pixels.astype(int) - before.pixels)
        box = eyes.faces(before.pixels)[0].box
        assert 4 < change.max() <= 10 + 30  # the bound, and what the codec adds
        assert change[:, : max(1, int(box[0] - 40))].mean() < change.mean()


def test_the_attacked_recogniser_is_not_scored(lines):
    unprotected, attacked = lines
    assert attacked.cell("mobilefacenet") is None and attacked.cell("faceres") is not None
    assert attacked.cell(AVERAGE) == attacked.cell("faceres")
    inside = attacked.figures["identity"]["mobilefacenet"]["protected"]["none"]
    assert inside["ism"]["value"] < 0.3 < unprotected.cell("mobilefacenet")["ism"]["value"]
    assert unprotected.cell("faceres")["rank1_u"]["value"] == 0
    text = protection_table(lines, ("mobilefacenet", "faceres"), ("none",))
    rows = [r.split(" | ") for r in text.splitlines()]
    assert rows[0][7:9] == ["JOD", "JOD, 5 %"] and rows[2][7:9] == ["10.00", "10.00"]
    assert 5 < float(rows[3][8]) <= float(rows[3][7]) < 9.9
    assert unprotected.jod("jpeg75+half") == ("-", "-")  # JOD is of the file as saved
    assert rows[3][2] == "inside" and rows[2][2] == "0.0" and len({len(r) for r in rows}) == 1


def test_again_nothing_is_made(place, lines, monkeypatch):
    files = {
        p: p.stat().st_mtime_ns
        for p in (place / "work").rglob("*")
        if p.suffix in (".jpg", ".parquet") and p.name not in ("faces.parquet",) and not p.name.startswith("gallery-")
    }
    made = make(lines[1].method, place / "originals", place / "work/trees", workers=1, say=print)
    assert made.seconds_per_face == lines[1].made.seconds_per_face and made.failed == lines[1].made.failed
    assert files == {p: p.stat().st_mtime_ns for p in files}


def test_other_settings_and_lost_files_are_made_anew(place, lines):
    """One tree holds what one setting made, whoever wrote there before; nothing of it goes missing for good."""
    folder = place / "work/trees"
    strong, weak = lines[1].method, replace(lines[1].method, eps=3 / 255)

    def files(method: Method) -> dict[str, bytes]:
        made = make(method, place / "originals", folder, workers=1, say=print)
        return {p.relative_to(made.tree).as_posix(): p.read_bytes() for p in sorted(Path(made.tree).rglob("*.jpg"))}

    first = files(strong)
    second = files(weak)
    assert first.keys() == second.keys() and all(first[name] != second[name] for name in first)
    assert files(strong) == first
    (folder / "mi-fgsm/Ada/0.jpg").unlink()
    assert files(strong) == first


def test_what_may_change_lies_about_the_box():
    mask = box_mask(torch.tensor([[30.0, 20.0, 50.0, 60.0]]), 100, 90)
    assert mask.shape == (1, 1, 100, 90) and set(mask.unique().tolist()) == {0.0, 1.0}
    y, x = np.nonzero(mask[0, 0].numpy())
    assert (x.min(), x.max(), y.min(), y.max()) == (14, 66, 14, 66)  # a square of 1.3 times the longer side


def test_targets_are_other_people():
    features = target_features(("faceres",), "cpu")[0]
    assert features.shape[0] == 10 and torch.allclose(features.norm(dim=1), torch.ones(10), atol=1e-4)
    cosines = features @ features.T - torch.eye(10)
    assert float(cosines.max()) < 0.8


def test_a_folder_of_outputs_is_a_method(place):
    method = Method("theirs", "folder", folder=str(place / "originals"), inside=("faceres",))
    made = make(method, place / "originals", place / "work", workers=1, say=print)
    assert made.tree == str(place / "originals") and method.used == ("faceres",)
    assert Method("x", "ours", profile="standard").used == ("dlib_resnet", "mobilefacenet")
