"""The figures on generated people: what is shown is what was measured; and what stands behind them, by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipelines.cli.main import main
from pipelines.experiments import conditions, figures
from pipelines.experiments.conditions import Hardness, cover, hardness, pick
from pipelines.experiments.figures import TOP, retrieve
from pipelines.experiments.sheet import Cell, Figure, Strip, difference, to_html, write_png
from tests.helpers.lfw_tree import lfw

SEEDS = {"Ada": 15, "Ben": 10, "Cleo": 13, "Dan": 2}
# Eyes, nose and mouth corners of a face that looks straight ahead.
FRONT = np.array([[100.0, 100], [160, 100], [130, 135], [105, 165], [155, 165]])


# ---- conditions ------------------------------------------------------------------------------------------------------


def test_hardness_by_hand():
    crop = np.full((64, 64, 3), 51, np.uint8)
    crop[:, 32:] = 153
    crop[:10] = 255  # beside the middle half, which counts
    got = hardness(FRONT, crop)
    assert got.side == pytest.approx(0.5)  # (0.6 - 0.2) / 0.8
    assert (got.yaw, got.roll) == (0, 0) and got.luminance == pytest.approx(0.4) and got.contrast == pytest.approx(0.2)
    turned = FRONT.copy()
    turned[2] = [148, 135]  # the nose 18 px to the right, the eyes are 60 px apart
    assert hardness(turned, crop).yaw == pytest.approx(0.3)
    angle = np.radians(20)
    rotated = turned @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    tilted = hardness(rotated, crop)
    assert tilted.roll == pytest.approx(20)
    assert tilted.yaw == pytest.approx((18 * np.cos(0) / 60))  # in the face's own frame


def test_each_condition_gets_those_who_have_it_most():
    found = {f"p{i}": Hardness(0.01 * i, 0.0, 0.5, 0.2, 0.001 * i) for i in range(5)}
    found |= {"left": Hardness(-0.6, 0, 0.5, 0.2, 0), "night": Hardness(0.2, 0, 0.1, 0.2, 0)}
    found |= {"fog": Hardness(0.2, 0, 0.5, 0.02, 0), "window": Hardness(0.2, 0, 0.5, 0.2, -0.3)}
    got = pick(found, 2)
    assert got["pose"][0] == "left" and got["dark"][0] == "night" and got["flat"][0] == "fog"
    assert got["side-lit"][0] == "window"
    assert got["easy"] == got["covered"] == ["p0", "p1"] and set(got) == set(conditions.CONDITIONS)
    assert {len(some) for some in got.values()} == {2}


def test_what_is_drawn_covers_the_face():
    photo = np.full((260, 260, 3), 128, np.uint8)
    glasses, mask = (cover(photo, FRONT, number) for number in (0, 1))
    for x, y in FRONT.astype(int)[:2]:
        assert glasses[y, x].max() < 40 and (mask[y, x] == 128).all()
    for x, y in FRONT.astype(int)[2:]:
        assert mask[y, x].min() > 180 and (glasses[y, x] == 128).all()
    assert (photo == 128).all() and 0.02 < (glasses != 128).mean() < 0.3 and 0.02 < (mask != 128).mean() < 0.3


# ---- retrieval, pictures ---------------------------------------------------------------------------------------------


def test_retrieval_by_hand():
    people = ["a", "b", "c", "d", "e", "f"]
    got = retrieve(np.array([0.1, 0.9, 0.5, 0.4, 0.3, 0.2]), people, "c")
    assert got["rank"] == 2 and got["cosine_to_person"] == 0.5 and len(got["first"]) == TOP
    assert [one["person"] for one in got["first"]] == ["b", "c", "d", "e", "f"] and got["first"][0]["cosine"] == 0.9
    assert retrieve(np.array([0.1, 0.9, 0.5, 0.4, 0.3, 0.2]), people, "a")["rank"] == 6


def some_figure() -> Figure:
    grey, white = np.full((40, 40, 3), 90, np.uint8), np.full((40, 40, 3), 255, np.uint8)
    cells = (Cell(grey, ("original",)), Cell(white, ("0.5", "the person"), True), Cell(None, ("none",)))
    strips = (Strip("Ada <b>", cells, "by x"), Strip("Ben", cells[:1]))
    return Figure("figure-x", "Title & more", ("A note <i>.",), (("Numbers", [("", "a"), ("row", "1.0")]),), strips)


def test_a_page_of_one_file():
    page = to_html(some_figure())
    assert "Ada &lt;b&gt;" in page and "<b>" not in page and "A note &lt;i&gt;." in page and "Title &amp; more" in page
    assert page.count("<img ") == 3 and not re.search(r'(src|href)="(?!data:|#)', page) and "1.0</td>" in page


def test_a_sheet_with_frames(tmp_path):
    write_png(some_figure(), tmp_path / "x.png", side=100)
    with Image.open(tmp_path / "x.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    colours = {tuple(c) for c in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}
    assert {(90, 90, 90), (27, 110, 60)} <= colours and (179, 38, 30) not in colours  # right, and none is wrong
    assert pixels.shape[1] > 3 * 100 and pixels.shape[0] > 2 * 100


def test_differences_are_amplified():
    a, b = np.full((2, 2, 3), 100, np.uint8), np.full((2, 2, 3), 97, np.uint8)
    assert (difference(a, b) == 30).all() and (difference(b, np.zeros_like(b)) == 255).all()


# ---- running ---------------------------------------------------------------------------------------------------------


def test_figures_run_and_go_on(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(figures.judges, "available", lambda *store: ("mobilefacenet", "faceres"))
    root, out = lfw(tmp_path / "lfw", SEEDS), tmp_path / "out"
    command = ["--data", str(root), "--limit", "1", "--distractors", "2", "--profile", "quick", "--workers", "1"]
    command += ["--out", str(out), "--set", "gallery.synthetic=200"]
    command += ["--set", "attack.steps=4", "--set", "attack.eps=0.03"]
    for section, steps in (("tune", 2), ("refine", 0)):
        command += ["--set", f"{section}.identity=mobilefacenet", "--set", f"{section}.steps={steps}"]

    def figure(name: str) -> dict:
        got = CliRunner().invoke(main, ["experiment", "run", name, *command])
        assert got.exit_code == 0, got.output
        assert (out / f"{name}.md").read_text().strip() in got.output
        page = (out / f"{name}.html").read_text()
        assert page.count("<img ") >= 4 and not re.search(r'src="(?!data:)', page)
        with Image.open(out / f"{name}.png") as image:
            assert image.width > 500 and image.height > 140
        return json.loads((out / f"{name}.json").read_text())

    retrieval, random, attack = map(figure, ("figure-retrieval", "figure-random-code", "figure-attack"))
    hard = figure("figure-hard")
    made = work(out)
    assert figure("figure-attack")["faces"] == attack["faces"] and figure("figure-hard")["photos"] == hard["photos"]
    assert made == work(out)

    found = {(f["person"], f["subject"]): f for f in retrieval["retrievals"]}
    assert {f["judge"] for f in retrieval["retrievals"]} == {"faceres"} and len(found) == 3
    for person in {p for p, _ in found}:
        assert found[person, "original"]["rank"] == 1 and len(found[person, "original"]["first"]) == 3
        assert found[person, "fused"]["cosine_to_person"] < found[person, "original"]["cosine_to_person"]
        assert found[person, "protected"]["cosine_to_person"] < found[person, "original"]["cosine_to_person"]

    assert random["judges"] == ["faceres"] and len(random["faces"]) == 1
    for face in random["faces"].values():
        assert face["fused"]["saved"]["psnr"] > 10 and face["random"]["saved"]["psnr"] > 10
        assert face["fused"]["code"]["psnr"] != face["random"]["code"]["psnr"]

    for face in attack["faces"].values():  # of the files as they were saved
        distances = face["distance_to_target"]
        assert distances["with"] < distances["without"] and 0 < face["components"] <= 1
        assert face["with"]["psnr"] < face["without"]["psnr"]

    by_condition = {c: [f for f in hard["photos"].values() if f["condition"] == c] for c in conditions.CONDITIONS}
    assert {len(some) for some in by_condition.values()} == {1}
    yaw, light = ({c: [abs(f["hardness"][m]) for f in by_condition[c]] for c in ("easy", "pose", "dark")}
                  for m in ("yaw", "luminance"))  # fmt: skip
    assert max(yaw["pose"]) >= max(yaw["easy"]) and min(light["dark"]) <= min(light["easy"])
    easy = {path.split("/")[1] for path in hard["photos"] if path.startswith("easy/")}
    for path in hard["photos"]:
        condition, person, name = path.split("/")
        same = (out / "hard/photos/originals" / path).read_bytes() == (root / person / name).read_bytes()
        assert same == (condition != "covered") and (condition not in ("easy", "covered") or person in easy)


def work(out: Path) -> dict[Path, int]:
    """What costs time to make, and when it was made."""
    names = ("run", "work", "trees", "photos", "pool", "pool.run")
    return {
        path: path.stat().st_mtime_ns
        for path in out.rglob("*")
        if path.suffix in (".jpg", ".parquet")
        and not path.name.startswith(("plan", "gallery-"))  # these are put together from parts, anew each time
        and any(name in path.relative_to(out).parts for name in names)
    }


def test_every_experiment_is_listed():
    got = CliRunner().invoke(main, ["experiment", "list"])
    assert got.exit_code == 0 and all(name in got.output for name in figures.TITLES)
