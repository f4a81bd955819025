"""The bar of a judge, from faces whose answer is known."""

from __future__ import annotations

from pipelines.bench.judges import bar_of, curve, main
from pipelines.bench.protection import left_out
from pipelines.config.load import load_config


def test_the_bar_is_the_largest_cosine_below_which_other_photos_are_rejected() -> None:
    hidden = [(0.01 * n, True, False) for n in range(1, 41)]
    assert bar_of([*hidden, (0.5, False, True), (0.6, True, False)]) == 0.4, "nothing above a face that is ranked first"
    assert bar_of([*hidden, (0.5, False, False), (0.6, True, False)]) == 0.6, "one accepted of 42 is below 5 %"
    assert bar_of([*hidden[:5], (0.5, False, False)]) == 0.05, "one of 6 is not"
    assert bar_of([(0.1, True, True)]) is None and bar_of([]) is None


def test_the_curve_has_shares_by_steps() -> None:
    lines = curve([(0.31, True, False), (0.34, False, False), (0.36, False, True)])
    assert [(line["from"], line["number"], line["rejected"], line["first"]) for line in lines] == [
        (0.3, 2, 0.5, 0.0),
        (0.35, 1, 0.0, 1.0),
    ]


def test_each_recogniser_judges_a_run_that_it_has_no_part_in() -> None:
    lines = left_out("standard")
    judges = [load_config(line.profile, sets=line.sets).publish.judge for line in lines]
    assert sorted(judges) == ["dlib_resnet", "faceres", "mobilefacenet"]
    assert all(judge not in line.used and len(line.used) == 2 for judge, line in zip(judges, lines, strict=True))


def test_a_folder_without_evaluations_is_told(tmp_path, capsys) -> None:
    assert main(["--folder", str(tmp_path), "--out", str(tmp_path / "x.json")]) == 2
    assert "no evaluation" in capsys.readouterr().err and not (tmp_path / "x.json").exists()
