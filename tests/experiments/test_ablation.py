"""Who is developed on, variants and their files, splits in which no judge is inside, and an ablation that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pipelines.cli.main import main
from pipelines.config.load import load_config
from pipelines.experiments import ablation, protocol, tables, variants
from pipelines.experiments.datasets import DatasetError, DatasetPhoto
from pipelines.experiments.faces import COLUMNS
from pipelines.experiments.methods import Method
from pipelines.experiments.variants import Variant, VariantError
from scol_ops.distortions import NONE
from tests.helpers.lfw_tree import lfw

SEEDS = {"Ada": 15, "Ben": 10, "Cleo": 13, "Dan": 2, "Eve": 21}
NAMES = ("mobilefacenet", "dlib_resnet", "faceres")


def photos(people: int) -> list[DatasetPhoto]:
    return [DatasetPhoto(f"p{i}/{n}.jpg", f"p{i}") for i in range(people) for n in range(2 if i % 4 else 1)]


def options(**changes) -> tables.Options:
    return tables.Options(**({"data": "", "dataset": "lfw", "out": "", "profile": "standard"} | changes))


def features(*names: str) -> tuple[str, ...]:
    return tuple(f"{section}.identity={','.join(names)}" for section in ("tune", "refine"))


def split(variant: Variant, **changes):
    return ablation.splits(variant, options(**changes))


# ---- who is developed on ---------------------------------------------------------------------------------------------


def test_people_whose_results_are_reported_are_left_out():
    some = photos(240)  # 180 of them with two photos
    kept = protocol.choose(some, protocol.REPORTED_PEOPLE, 1000, protocol.REPORTED_SEED)  # as bench-protection draws
    assert protocol.reported(some) == set(kept.probes) and len(kept.probes) == 128
    for seed in (0, 1):
        found = protocol.develop(some, 52, 1000, seed)
        drawn = {*found.probes, *found.mates, *found.distractors}
        assert len(found.probes) == 52 and not drawn & protocol.reported(some)
        assert len(drawn) == 240 - 128  # everybody else
    assert protocol.develop(some, 20).probes != protocol.develop(some, 20, seed=1).probes
    assert protocol.develop(some, 20).probes.items() <= protocol.develop(some, 30).probes.items()
    with pytest.raises(DatasetError, match="53 people .* there are 52 besides 128 who are left out"):
        protocol.develop(some, 53)
    with pytest.raises(DatasetError, match="there are 0 besides 75"):  # all who have two photos would be reported
        protocol.develop(photos(100), 1)


# ---- variants --------------------------------------------------------------------------------------------------------


def test_built_in_variants_can_all_be_used():
    """Every setting loads, and says what its name says."""
    for variant in variants.built_in().values():
        for judge, method in split(variant).items():
            assert judge not in method.used and method.profile == "standard"
        key, _, value = variant.name.partition("=")
        if key in ("refine.start", "attack.eps", "mask.scale", "mask.features"):
            section, name = key.split(".")
            wanted = float(value) / (255 if name == "eps" else 1)
            assert getattr(getattr(load_config(sets=method.sets), section), name) == pytest.approx(wanted)
    assert set(variants.DEFAULT) <= set(variants.built_in()) and len(variants.DEFAULT) <= 6
    attacked = load_config(sets=split(variants.built_in()["attack.eps=8"])["faceres"].sets)
    assert attacked.attack.enabled and attacked.attack.step_size == pytest.approx(2 / 255)
    found = {name: load_config(sets=split(v)["faceres"].sets) for name, v in variants.built_in().items()}
    lock = found["lock"]
    assert (lock.tune.hinge, lock.refine.hinge) == (0, 0) and lock.tune.id_lock == 0.3 and lock.refine.id_lock == 1
    assert found["hinge+lock"].refine.hinge == load_config().refine.hinge > 0
    assert (found["tune=off"].tune.steps, found["tune=off"].refine.start) == (0, 0) and found["tune=off"].refine.steps
    for name, config in found.items():  # a share of a tuned face, or that face itself, needs one
        assert config.tune.steps or (config.refine.start == 0 and config.refine.steps), name
    assert (found["seen=off"].refine.seen, found["limit=off"].refine.limit, found["colour"].refine.chroma) == (0, 0, 1)
    off = found["refine=off"]
    assert off.refine.steps == 0 and not off.attack.enabled and not off.has_stage("strengthen")


def test_selection_begins_with_the_base():
    assert [v.name for v in variants.select()] == ["base", *variants.DEFAULT]
    got = variants.select(["refine.start=0.8"], ["start", "attack"])
    assert [v.name for v in got][:4] == ["base", "refine.start=0.8", "refine.start=0.3", "attack=off"] and len(got) == 7
    with pytest.raises(VariantError) as error:
        variants.select(["fuse.k=2", "refine=of"], ["atack"])
    assert len(error.value.problems) == 3 and "did you mean 'refine=off'" in str(error.value)
    assert "did you mean 'attack'" in str(error.value)


def test_variants_of_a_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[wide]\nfuse.k = 50\ntune = {parameters = "all", steps = 40}\n["refine 2"]\nrefine.start = 1\n')
    with pytest.raises(VariantError, match="'refine 2': a variant is named by"):
        variants.read_file(file)
    file.write_text(file.read_text().replace("refine 2", "refine.jpeg-30"))
    file.write_text(file.read_text() + 'refine.jpeg_quality = [30, 60]\nrefine.identity = ["faceres"]\n')
    assert [v.name for v in variants.select(file=file)] == ["base", "wide", "refine.jpeg-30"]
    assert [v.name for v in variants.select(["refine=off", "wide"], file=file)] == ["base", "refine=off", "wide"]
    wide, robust = variants.read_file(file)
    found = load_config(sets=split(wide)["faceres"].sets)
    assert (found.fuse.k, found.tune.parameters, found.tune.steps) == (50, "all", 40)
    assert load_config(sets=split(robust)["dlib_resnet"].sets).refine.jpeg_quality == (30, 60)
    for text, words in (
        ("fuse.k = 5", "fuse: no settings|a section is expected|unknown"),
        ("k = 5", "k: a section is expected"),
        ("[a]", "a: no settings"),
        ("", "no variant"),
        ("[a", "not TOML"),
        ("[base]\nfuse.k=2", "base: this is the name of a built-in"),
    ):
        file.write_text(text)
        with pytest.raises(VariantError, match=words):
            for variant in variants.select(file=file):
                split(variant)
    with pytest.raises(VariantError, match="No such file"):
        variants.read_file(tmp_path / "none.toml")


def test_settings_that_are_wrong_are_told_before_anything_runs():
    wrong = [Variant("a", ("fuse.q=1",)), Variant("b", ("fuse.k=0",)), Variant("c", ("attack.enabled=maybe",))]
    with pytest.raises(VariantError) as error:
        ablation.plan([variants.BASE, *wrong], options())
    assert [p.split(":")[0] for p in error.value.problems] == ["a", "b", "c"]
    assert "unknown key" in error.value.problems[0]


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_every_recogniser_judges_and_none_that_is_inside():
    found = split(variants.BASE)
    assert {judge: method.used for judge, method in found.items()} == {
        "mobilefacenet": ("dlib_resnet", "faceres"),
        "dlib_resnet": ("faceres", "mobilefacenet"),
        "faceres": ("dlib_resnet", "mobilefacenet"),
    }
    assert found["faceres"].name == "base" and found["dlib_resnet"].name == "base-judged-by-dlib_resnet"
    one = split(Variant("identity=one", features("mobilefacenet")))
    assert one["dlib_resnet"].name == one["faceres"].name == "identity=one"
    assert one["mobilefacenet"].used == ("dlib_resnet",)
    # What works through the encoder works through its trunk's features: that recogniser has nothing to judge.
    assert set(split(variants.built_in()["attack.eps=8"])) == {"dlib_resnet", "faceres"}
    mixed = Variant("two+encoder", features("mobilefacenet", "dlib_resnet", "encoder"))
    assert set(split(mixed)) == {"dlib_resnet", "faceres"}
    three = Variant("three", features(*NAMES))
    assert {j: len(m.used) for j, m in split(three).items()} == dict.fromkeys(NAMES, 2)


def test_nobody_left_to_judge(monkeypatch):
    monkeypatch.setattr(ablation.judges, "available", lambda: ("mobilefacenet",))
    with pytest.raises(VariantError, match="attack.eps=8: every recogniser is inside"):
        split(variants.built_in()["attack.eps=8"])


def test_margins_stay_with_their_features():
    sets = ("refine.identity=dlib_resnet,mobilefacenet", "refine.margins=0.4,-0.2", "tune.identity=mobilefacenet")
    found = {j: load_config(sets=m.sets) for j, m in split(Variant("x", sets)).items()}
    assert found["faceres"].refine.margins == (0.4, -0.2)
    spare = load_config().refine.default_margins["faceres"]
    refine = found["mobilefacenet"].refine
    assert dict(zip(refine.identity, refine.margins, strict=True)) == {"dlib_resnet": 0.4, "faceres": spare}
    assert found["mobilefacenet"].tune.identity == ("faceres",)
    assert found["dlib_resnet"].tune.identity == ("mobilefacenet",) and found["dlib_resnet"].tune.margins == ()


# ---- figures ---------------------------------------------------------------------------------------------------------


def measured(name: str, judged: dict[str, dict[str, float]]) -> ablation.Measured:
    """ISM of each person by each judge; other measures 0.5, and NaN after the distortion."""

    def row(ism: float) -> np.ndarray:
        return np.array([np.nan if s != NONE else ism if m == "ism" else 0.5 for m, s in COLUMNS])

    faces = {judge: {person: row(ism) for person, ism in found.items()} for judge, found in judged.items()}
    methods = {judge: Method(name, "ours") for judge in judged}
    return ablation.Measured(Variant(name), methods, faces, dict.fromkeys(judged, 3.0))


def test_means_and_differences_by_hand():
    base = measured("base", {"a": {"x": 0.5, "y": 0.9}, "b": {"x": 0.3, "y": 0.5}, "c": {"x": 0.1, "y": 0.1}})
    other = measured("other", {"a": {"x": 0.4, "y": 0.8}, "b": {"x": 0.0, "y": 0.2, "z": 0.7}})
    assert ablation.common_judges([base, other]) == ["a", "b"]
    got = ablation.record([base, other])
    assert got[0]["mean"]["ism"]["value"] == pytest.approx((0.4 + 0.7) / 2) and got[0]["mean"]["faces"] == 2
    assert got[1]["mean"]["ism"]["value"] == pytest.approx((0.2 + 0.5) / 2) and got[1]["mean"]["faces"] == 2
    change = got[1]["mean"]["less_base"]["ism"]  # -0.2 for either person, so the interval is a point
    assert [change[k] for k in ("value", "low", "high")] == pytest.approx([-0.2] * 3) and change["n"] == 2
    assert got[1]["judges"]["b"]["ism"]["n"] == 3 and got[1]["judges"]["b"]["less_base"]["ism"]["n"] == 2
    assert got[1]["judges"]["a"]["ism@jpeg75+half"] is None
    text = ablation.table([base, other], 4)
    rows = [[c.strip() for c in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    assert rows[0][6:8] == ["JOD", "JOD, 5 %"] and rows[2][6].startswith("0.50") and rows[2][7] == "0.50"
    assert "JOD" not in text.partition("After")[2]
    assert rows[2][:3] == ["base", "mean of 2", "2 of 4"] and rows[2][5] == "-"
    assert rows[6][:3] == ["other", "mean of 2", "2 of 4"] and rows[6][5] == "-0.200 [-0.200, -0.200]"
    assert rows[6][3] == "50.0 [50.0, 50.0]"
    half = len(rows) // 2  # after the distortion there is no JOD
    assert {len(r) for r in rows[:half]} == {12} and {len(r) for r in rows[half:]} == {10}
    lonely = measured("lonely", {"d": {"x": 0.4}})
    assert "no means" in ablation.table([base, lonely], 4) and "mean of" not in ablation.table([base, lonely], 4)


# ---- running ---------------------------------------------------------------------------------------------------------


def test_an_ablation_runs_and_goes_on(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "REPORTED_PEOPLE", 2)
    monkeypatch.setattr(ablation.judges, "available", lambda *store: ("mobilefacenet", "faceres"))
    root = lfw(tmp_path / "lfw", SEEDS)
    file = tmp_path / "mine.toml"
    # Nobody is inside the base. The other one's encoder keeps its trunk from judging, and faceres has to be replaced.
    file.write_text('[other]\ntune.steps = 1\ntune.identity = ["encoder", "faceres"]\n')
    command = ["experiment", "run", "ablation", "--data", str(root), "--limit", "2", "--distractors", "1"]
    command += ["--profile", "quick", "--workers", "1", "--variants-file", str(file), "--out", str(tmp_path / "out")]
    command += ["--set", "gallery.synthetic=200", "--set", "tune.steps=0", "--set", "refine.steps=0"]
    first = CliRunner().invoke(main, command)
    assert first.exit_code == 0, first.output
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if is_work(p)}
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 0, again.output
    assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if is_work(p)}
    text = (tmp_path / "out/ablation.md").read_text()
    assert text.strip() in first.output and "apart from the 2 whose results are reported" in text
    rows = [[c.strip() for c in r.strip("| ").split(" | ")][:3] for r in text.splitlines() if r.startswith("| other")]
    assert rows == 2 * [["other", j, "2 of 2"] for j in ("mean of 1", "faceres")]
    base, other = json.loads((tmp_path / "out/ablation.json").read_text())["variants"]
    assert {j: (c["method"], c["inside"]) for j, c in base["judges"].items()} == dict.fromkeys(
        ("mobilefacenet", "faceres"), ("base", [])
    )
    assert {j: (c["method"], c["inside"]) for j, c in other["judges"].items()} == {
        "faceres": ("other-judged-by-faceres", ["mobilefacenet"])
    }
    assert base["mean"]["psnr"]["value"] > 10 and 0 < base["mean"]["jod"]["value"] <= 10
    assert (tmp_path / "out/trees/other-judged-by-faceres").is_dir()
    assert -1 < other["mean"]["less_base"]["ism@jpeg75+half"]["value"] < 1
    # Faces, codes and fusion are the same for all, so they were made once.
    parts = {stage: len(list((tmp_path / "out/run").rglob(f"{stage}/**/*.parquet"))) for stage in ("fuse", "tune")}
    assert parts["tune"] == 2 * parts["fuse"] > 0


def is_work(path: Path) -> bool:
    """What costs time to make; plans, and tables put together from parts, are written anew."""
    inside = any(part in path.parts for part in ("run", "work", "trees", "photos"))
    return inside and path.suffix in (".jpg", ".parquet") and not path.name.startswith(("plan", "gallery-"))


def test_the_ablations_options_are_its_own():
    got = CliRunner().invoke(main, ["experiment", "run", "table1", "--group", "tune"])
    assert got.exit_code == 2 and "of the ablation, not of table1" in got.output
    got = CliRunner().invoke(main, ["experiment", "run", "ablation", "--variants", "fuse.k=3"])
    assert got.exit_code == 2 and got.output.startswith("error: unknown variant 'fuse.k=3'")
    got = CliRunner().invoke(main, ["experiment", "list"])
    assert all(name in got.output for name in ("table5", "ablation", "refine.start=0.8"))
