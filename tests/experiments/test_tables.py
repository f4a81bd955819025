"""The tables' layout, the paper's figures in it, and an experiment that goes on where it was stopped."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from pipelines.cli.main import main
from pipelines.config.load import load_config
from pipelines.experiments import comparison, methods, tables
from pipelines.experiments.comparison import UNPROTECTED, Line
from pipelines.experiments.methods import Made, Method
from pipelines.experiments.swaps import SwapFigures, measure_swaps
from pipelines.experiments.tables import ExperimentError, Options
from pipelines.jobs.demo import draw_person
from scol_ops.models.embedded import load_mobilestylegan

# Person -> seed; each has two photos.
SEEDS = {"Ada": 15, "Ben": 10, "Cleo": 13}


def write(path: Path, person: int, variant: int, side: int = 200) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    out = io.BytesIO()
    image = Image.fromarray(draw_person(person, variant, 256)).resize((side, side), Image.Resampling.BOX)
    image.save(out, "PNG" if path.suffix == ".png" else "JPEG")
    path.write_bytes(out.getvalue())


def options(**changes) -> Options:
    return Options(**({"data": "", "dataset": "lfw", "out": ""} | changes))


def estimate(value: float) -> dict:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 9}


def line(method: Method, rank: float, ism: float = 0.2, psnr: float = 33.0) -> Line:
    cell = {"rank1_u": estimate(rank), "ism": estimate(ism), "verified_own_1e-2": estimate(0)}
    variants = {"protected": {v: cell for v in ("none", tables.DISTORTION)}}
    picture = {
        m: {v: estimate(psnr if "psnr" in m else 0.9) for v in ("none", tables.DISTORTION)}
        for m in ("psnr", "face_psnr", "face_ssim", "face_flip")
    } | {"jod": {"none": estimate(9.25)}}
    names = ("mobilefacenet", "dlib_resnet", "faceres", "average")
    spread = {"jod": {"p5": 8.5 - 0.5 * rank}}
    figures = {"identity": {n: variants for n in names}, "picture": picture, "distributions": spread}
    return Line(method, Made("", 1.0), figures)


def cells(text: str) -> dict[str, list[str]]:
    rows = [[c.strip() for c in r.strip("| ").split(" | ")] for r in text.splitlines() if r.startswith("|")]
    assert len({len(r) for r in rows}) == 1
    return {r[0]: r[1:] for r in rows}


def test_who_judges_whom():
    given = options(profile="standard", others={"theirs": "x"}, inside={"theirs": ["faceres"]})
    methods = {m.name: m for m in tables.leave_one_out(given)}
    assert methods["mi-fgsm"].used == ("mobilefacenet", "dlib_resnet")
    assert methods["tip-im-judged-by-dlib_resnet"].used == ("mobilefacenet", "faceres")
    assert methods["scol"].used == ("dlib_resnet", "mobilefacenet")
    assert methods["scol-judged-by-mobilefacenet"].used == ("dlib_resnet", "faceres")
    assert methods["theirs"].used == ("faceres",)
    assert methods["theirs"].kind == "folder" and Path(methods["theirs"].folder).is_absolute()
    own = [load_config(m.profile, sets=m.sets) for m in methods.values() if m.kind == "ours"]
    assert own and not any(config.has_stage("strengthen") for config in own)
    for method in methods.values():  # no judge is inside, and every configuration can be loaded
        judge = method.name.partition("-judged-by-")[2]
        assert judge not in method.used
    # Features of the refinement count as those of the tuning, and margins stay with their features.
    apart = ("tune.identity=dlib_resnet", "refine.identity=mobilefacenet", "refine.margins=-0.4")
    mixed = {m.name: m for m in tables.leave_one_out(options(profile="standard", sets=apart))}
    assert mixed["mi-fgsm"].used == ("dlib_resnet", "mobilefacenet")
    line = load_config("standard", sets=mixed["scol-judged-by-dlib_resnet"].sets)
    assert (line.tune.identity, line.refine.identity, line.refine.margins) == (
        ("faceres",),
        ("mobilefacenet",),
        (-0.4,),
    )
    paper = {m.name for m in tables.leave_one_out(options(profile="paper"))}
    assert "scol" in paper and not any(n.startswith("scol-judged") for n in paper)  # it uses the encoder alone


def test_sweeps_change_one_setting():
    for name, key, values in (
        ("table2", "id_lock", [0, 0.1, 0.5, 1, 5]),
        ("table3", "tau", [1, 2, 3, 4, 5]),
        ("table4", "eps", [4 / 255, 8 / 255, 16 / 255]),
    ):
        # `standard` has a closed loop, whose judge would score what it chose: it is off unless asked for.
        given = options(profile="standard", sets=("tune.steps=3",))
        methods = [m for m in tables.EXPERIMENTS[name].methods(given) if m.kind == "ours"]
        found = [load_config(m.profile, sets=m.sets) for m in methods]
        section = {"id_lock": "tune", "tau": "inspect", "eps": "attack"}[key]
        assert [getattr(getattr(c, section), key) for c in found] == pytest.approx(values)
        assert {c.tune.steps for c in found} == {3} and len({m.name for m in methods}) == len(values)
        assert not any(c.has_stage("strengthen") for c in found)
        if key == "eps":  # a bound that the steps cannot reach would change nothing
            assert all(c.attack.step_size == pytest.approx(c.attack.eps / 4) for c in found)
    # The lock is one of the tuning, so there is tuning, whose face is judged.
    for profile, refined in (("standard", False), ("paper", False)):
        first = tables.EXPERIMENTS["table2"].methods(options(profile=profile))[1]
        config = load_config(profile, sets=first.sets)
        assert config.tune.steps == {"standard": 30, "paper": 450}[profile] and config.refines is refined
    asked = options(profile="standard", sets=("strengthen.rounds=2", "attack.step_size=0.01"))
    last = load_config("standard", sets=tables.EXPERIMENTS["table4"].methods(asked)[-1].sets)
    assert last.strengthen.rounds == 2 and last.attack.step_size == 0.01 and last.has_stage("strengthen")


def test_table1_has_the_papers_figures_beside_ours():
    found = [
        line(UNPROTECTED, 0.05),
        line(Method("mi-fgsm", "attack", surrogates=("mobilefacenet", "dlib_resnet")), 0.5),
        line(Method("mi-fgsm-judged-by-mobilefacenet", "attack", surrogates=("dlib_resnet", "faceres")), 0.2),
        line(Method("mi-fgsm-judged-by-dlib_resnet", "attack", surrogates=("mobilefacenet", "faceres")), 0.8),
        line(Method("scol", "ours", profile="standard", sets=("attack.enabled=false",)), 0.97),
    ]
    got = cells(tables.table1(found, {}))
    assert got["mi-fgsm"][:4] == ["20.0 [10.0, 30.0]", "80.0 [70.0, 90.0]", "50.0 [40.0, 60.0]", "50.0"]
    assert got["mi-fgsm"][4:9] == ["70.2", "58.4", "59.2", "68.0", "63.9"]
    assert got["scol"][:3] == ["-", "-", "97.0 [87.0, 107.0]"] and got["scol"][4:9] == [
        "93.8",
        "85.6",
        "91.4",
        "90.7",
        "90.4",
    ]
    assert got["unprotected"][3] == "5.0" and got["unprotected"][4] == "-"
    assert got["mi-fgsm"][9:] == ["9.25", "8.10", "33.00", "0.900", "0.900", "50.0"]  # the worst 5 % of the lines


def test_tables_2_to_4():
    def ours(name):
        return Method(name, "ours", profile="quick", sets=("attack.enabled=false",))

    got = cells(
        tables.table2([line(ours("lambda-0.5"), 0.9, 0.3), line(ours("lambda-1"), 0.9), line(ours("lambda-5"), 1)], {})
    )
    assert (
        got["0.5"][0].startswith("0.300") and got["0.5"][-2:] == ["0.509", "-"] and got["1"][-2:] == ["0.158", "32.01"]
    )
    assert got["5"][-2:] == ["-", "-"]
    swaps = {"tau-3": SwapFigures({"a": 0.9, "b": 0.7}, {"a": 0.1, "b": 0.1}, 21.5, 9, 0, 0, 0, {"a": 0.5})}
    both = [line(ours("tau-3"), 1), line(ours("tau-4"), 1)]
    text = tables.EXPERIMENTS["table3"].table(both, swaps)
    got = cells(text)
    assert got["3"][2:4] == ["9.25", "33.00"]
    assert got["3"][4:] == ["80.0", "10.0", "50.0", "21.50", "95.50", "20.68"]
    assert got["4"][4:] == ["-", "-", "-", "-", "94.00", "20.94"]
    by_oracle = tables.EXPERIMENTS["table3"].table(both, {"tau-3": replace(swaps["tau-3"], swapper=tables.ORACLE)})
    assert by_oracle.count(tables.ORACLE) == 2 and tables.ORACLE not in text
    assert [n for n, e in tables.EXPERIMENTS.items() if e.swaps] == ["table3", "table4"]
    got = cells(tables.EXPERIMENTS["table4"].table([line(ours("eps-16"), 1)], {}))
    assert got["16"][-2:] == ["29.89", "20.60"]


def test_swaps_by_hand(tmp_path):
    """Swaps of the original show the source; of the protected one, somebody else (Ada), or the source still (Ben)."""
    for person, seed in (("Ada", 15), ("Ben", 10)):
        write(tmp_path / f"originals/{person}/0.jpg", seed, 0)
        write(tmp_path / f"original/{person}/0.jpg", seed, 1)
    write(tmp_path / "protected/Ada/0.jpg", 13, 0)
    write(tmp_path / "protected/Ben/0.jpg", 10, 1)
    write(tmp_path / "originals/Cleo/0.jpg", 13, 0)  # nobody swapped her
    got = measure_swaps(
        tmp_path / "originals", tmp_path / "original", tmp_path / "protected", ("mobilefacenet", "faceres")
    )
    assert got.dsr == {"mobilefacenet": 0.5, "faceres": 0.5} and got.without == {"mobilefacenet": 0.0, "faceres": 0.0}
    assert (got.sources, got.missing, got.unreadable, got.no_face) == (2, 1, 0, 0) and 5 < got.deepfake_psnr < 40
    assert got.of_recognised == got.dsr and got.swapper == "folder"
    write(tmp_path / "original/Ada/0.jpg", 13, 1)  # the swapper fails on Ada: what is defended there is not counted
    (tmp_path / "protected/Ben/0.jpg").unlink()
    write(tmp_path / "protected/Ben/0.jpg", 13, 1)
    got = measure_swaps(tmp_path / "originals", tmp_path / "original", tmp_path / "protected", ("faceres",))
    assert got.dsr == {"faceres": 1.0} and got.without == {"faceres": 0.5} and got.of_recognised == {"faceres": 1.0}
    with pytest.raises(ValueError, match="no original"):
        measure_swaps(tmp_path / "originals", tmp_path / "original", tmp_path, ("faceres",))


def test_an_experiment_runs_and_goes_on(ray_cluster, tmp_path, monkeypatch):
    """Protocol, evaluation, table and files; the methods, which have tests of their own, are folders here."""
    for person, seed in SEEDS.items():
        for number in (1, 2):
            write(tmp_path / f"lfw/{person}/{person}_{number:04d}.jpg", seed, number - 1)
    theirs = Method("theirs", "folder", folder=str(tmp_path / "theirs"), inside=("mobilefacenet",))
    monkeypatch.setitem(
        tables.EXPERIMENTS,
        "table1",
        replace(tables.EXPERIMENTS["table1"], methods=lambda options: [UNPROTECTED, theirs]),
    )
    monkeypatch.setattr(tables.judges, "available", lambda *store: ("mobilefacenet", "faceres"))
    for person in SEEDS:  # everybody has become another person of the tree
        for number in (1, 2):
            write(tmp_path / f"theirs/{person}/{person}_{number:04d}.png", 100 + SEEDS[person], 0)
    command = [
        "experiment",
        "run",
        "table1",
        "--data",
        str(tmp_path / "lfw"),
        "--limit",
        "2",
        "--distractors",
        "1",
        "--workers",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    first = CliRunner().invoke(main, command)
    assert first.exit_code == 0, first.output
    parts = sorted((tmp_path / "out/work").rglob("*.parquet"))
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 0 and parts == sorted((tmp_path / "out/work").rglob("*.parquet"))
    table = (tmp_path / "out/table1.md").read_text()
    assert table.strip() in first.output and table.strip() in again.output
    got = cells(table)
    assert got["unprotected"][1].startswith("0.0") and got["theirs"][0] == "-" and got["theirs"][1] != "-"
    found = json.loads((tmp_path / "out/table1.json").read_text())
    assert found["options"]["people"] == 2 and [entry["inside"] for entry in found["lines"]] == [[], ["mobilefacenet"]]
    assert found["lines"][1]["counts"]["photos_measured"] == 2


def test_lines_share_a_run(tmp_path, monkeypatch):
    """What comes before the setting that a table varies is made once: all lines of ours have the experiment's run."""
    for person, seed in SEEDS.items():
        for number in (1, 2):
            write(tmp_path / f"lfw/{person}/{person}_{number:04d}.jpg", seed, number - 1)
    asked = []

    def unchanged(source, out, config, *, run_url, **_):
        shutil.copytree(source, out)
        asked.append((run_url, Path(out).name, config.attack.eps))
        return {"reasons": {}, "strengthened": None, "seconds_per_face": 1.0, "weak_share": None}

    monkeypatch.setattr(methods, "protect", unchanged)
    figures = line(UNPROTECTED, 0.5).figures | {"counts": {"photos": 2}}
    monkeypatch.setattr(comparison.job, "evaluate", lambda *_, **__: SimpleNamespace(figures=figures))
    monkeypatch.setattr(tables, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(tables, "swaps_by_oracle", lambda *_: {})
    monkeypatch.setattr(tables, "record", lambda *_, **__: {})
    tables.run("table4", options(data=str(tmp_path / "lfw"), out=str(tmp_path / "out"), people=2, distractors=1))
    run = str(tmp_path / "out/run")
    assert asked == [(run, f"eps-{n}", pytest.approx(n / 255)) for n in (4, 8, 16)]


def test_cost_counts_what_is_known():
    """A tuning step is a forward and about two backward passes of the generator, and those of the identity features."""
    from torch.utils.flop_counter import FlopCounterMode

    from pipelines.experiments import costs

    found = costs.measure("quick", ("tune.steps=4", "refine.steps=0", "attack.enabled=false"))
    generator = load_mobilestylegan(256)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        generator(generator.mean_code.expand(1, 16, -1))
    forward = counter.get_total_flops() / 1e9
    assert 4 * 2 * forward < found.parts["tune"] < 4 * 5 * forward
    assert found.parts["attack"] == found.parts["refine"] == 0 and 0.5 < found.parts["invert"] < 50
    assert found.gflops == pytest.approx(sum(found.parts.values())) and 15 < found.mparams < 60 and found.seconds > 0


def test_what_a_line_lost_is_told():
    whole, part = line(UNPROTECTED, 0.0), line(Method("ours", "ours"), 1.0)
    whole.figures["counts"] = {"photos": 9, "photos_measured": 9}
    assert tables.lost_faces([whole]) == ""
    part.figures["counts"] = {"photos": 9, "photos_measured": 6, "photos_missing": 3}
    part.made.failed["TIMEOUT"] = "3"
    assert tables.lost_faces([whole, part]).strip() == (
        "Measured less than all 9 photos: ours: 6 photos (3 missing, TIMEOUT: 3)."
    )


def test_a_line_without_swaps_costs_itself_alone(tmp_path):
    for name in ("originals", "swaps/original", "swaps/tau-3"):
        write(tmp_path / name / f"{'Ada' if 'tau' not in name else 'Ben'}/0.jpg", 15, 0)
    ours = line(Method("tau-3", "ours", profile="quick", sets=("attack.enabled=false",)), 1.0)
    said: list[str] = []
    assert tables.swaps_of([ours], tmp_path / "originals", tmp_path / "swaps", said.append) == {}
    assert "no original" in said[-1]


def test_unknown_experiment():
    with pytest.raises(ExperimentError, match="table1, table2"):
        tables.run("table7", options())
    with pytest.raises(ExperimentError, match="--other-inside names 'x'"):
        tables.run("table1", options(inside={"x": ["faceres"]}))
