"""What the closed loop did, counted by hand."""

from __future__ import annotations

import pytest

from pipelines.experiments import loop


def face(rounds: int, share: float | None, ended: str, status: str, jod: float, ism: float) -> dict:
    measures = {"jod": jod, "psnr": 40 - 10 * ism, "face_ssim": 0.9, "flip": 0.1, "ism": ism, "ism_worst": ism + 0.1}
    return {"rounds": rounds, "share": share, "ended": ended, "status": status, **measures}


BY_SHARE, WHOLE, BACK, KNOWN, LEFT, SEEN = loop.OUTCOMES


def test_faces_by_what_became_of_them():
    rows = [
        face(0, 0.25, "passed", "ok", 9.4, 0.2), face(0, 0.5, "passed", "ok", 9.2, 0.4),
        face(0, 1, "passed", "ok", 9.1, 0.3), face(1, 0.5, "passed", "ok", 9.0, 0.3),
        face(1, 1, "rounds", "weak", 9.3, 0.6), face(2, 1, "diverged", "weak", 9.3, 0.6),
        face(1, 1, "time", "weak", 9.3, 0.6), face(0, 1, "rounds", "weak", 9.3, 0.7),
        face(0, 0.75, "sight", "weak", 8.9, 0.7), face(1, 0.75, "sight", "weak", 8.7, 0.5),
    ]  # fmt: skip
    wanted = [BY_SHARE, BY_SHARE, WHOLE, BACK, KNOWN, KNOWN, KNOWN, LEFT, SEEN, SEEN]
    assert [loop.outcome(row) for row in rows] == wanted
    lines = {line["faces"]: line for line in loop.by_outcome(rows, 9.0)}
    assert list(lines) == [*loop.OUTCOMES, "all"]
    assert [line["number"] for line in lines.values()] == [2, 1, 1, 3, 1, 2, 10]
    share = lines[BY_SHARE]
    assert share["ism"] == pytest.approx(0.3) and share["ism_worst"] == pytest.approx(0.4)
    assert share["share"] == pytest.approx(0.375) and share["jod"] == pytest.approx(9.3)
    assert [line["weak"] for line in lines.values()] == [0, 0, 0, 1, 1, 1, 0.6]
    assert [line["below"] for line in lines.values()] == [0, 0, 0, 0, 0, 1, 0.2], "at the bar it is not below"
    text = loop.table([lines[BY_SHARE], lines[SEEN]]).splitlines()
    assert "below 9 JOD, %" in text[0] and len({line.count("|") for line in text}) == 1
    assert text[2] == "| hidden by a share | 2 | 0.38 | 9.30 | 9.21 | 37.00 | 0.900 | 0.100 | 0.300 | 0.400 | 0 | 0 |"
    assert text[3].endswith("| 100 | 100 |")
    assert [line["faces"] for line in loop.by_outcome(rows[:1])] == [BY_SHARE, "all"] and loop.by_outcome([]) == []


def test_runs_without_a_bar_and_of_an_older_version():
    rows = [face(0, None, "passed", "ok", 9.4, 0.2), face(1, None, "quality", "weak", 9.0, 0.5)]
    assert [loop.outcome(row) for row in rows] == [WHOLE, KNOWN], "a change was whole, and went back for its cosine"
    older = [row | {"jod": None, "face_ssim": None} for row in rows]
    (first, *_, everything) = loop.by_outcome(older, 9.0)
    assert (first["jod"], first["share"], everything["below"]) == (None, None, None)
    assert loop.by_outcome([*older, rows[0]], 9.0)[-1]["jod"] == rows[0]["jod"]
    assert loop.by_outcome(rows)[-1]["below"] is None
    text = loop.table(loop.by_outcome(older))
    assert "| - | - | - | 38.00 | - | 0.100 |" in text and text.splitlines()[2].endswith("| 0 | - |")
