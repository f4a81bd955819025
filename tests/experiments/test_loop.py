"""What the closed loop did, counted by hand."""

from __future__ import annotations

import pytest

from pipelines.experiments import loop


def face(rounds: int, kept: int, status: str, psnr: float, ism: float) -> dict:
    measures = {"jod": 9 + ism, "face_ssim": 0.9, "flip": 0.1, "ism": ism, "ism_worst": ism + 0.1}
    ended = "passed" if not rounds else "rounds"
    return {"rounds": rounds, "kept": kept, "ended": ended, "status": status, "psnr": psnr, **measures}


def test_faces_by_what_became_of_them():
    rows = [face(0, 0, "ok", 36, 0.2), face(0, 0, "ok", 33.9, 0.4), face(2, 1, "weak", 35, 0.6), face(1, 0, "weak", 34, 0.8)]
    once, stronger, kept, everything = loop.by_outcome(rows)
    assert [line["faces"] for line in (once, stronger, kept)] == list(loop.OUTCOMES[:3]) and everything["faces"] == "all"
    assert [line["number"] for line in (once, stronger, kept, everything)] == [2, 1, 1, 4]
    assert once["ism"] == pytest.approx(0.3) and once["ism_worst"] == pytest.approx(0.4) and once["below"] == 0.5
    assert (once["weak"], stronger["weak"], everything["weak"], kept["below"]) == (0, 1, 0.5, 0)
    low = face(0, 0, "weak", 33, 0.9) | {"ended": "quality"}  # known, and below the stated quality as it came
    assert loop.outcome(low) == loop.OUTCOMES[3] and loop.by_outcome([*rows, low])[0]["number"] == 2
    text = loop.table([once, kept]).splitlines()
    cells = "| passed at once | 2 | 9.30 | 9.21 | 34.95 | 0.900 | 0.100 | 0.300 | 0.400 | 0 | 50 |"
    assert "below 34 dB" in text[0] and text[2] == cells
    assert [line["faces"] for line in loop.by_outcome(rows[:1])] == ["passed at once", "all"] and loop.by_outcome([]) == []
    # Runs of an older version have no JOD.
    older = [row | {"jod": None, "face_ssim": None} for row in rows]
    assert loop.by_outcome(older)[0]["jod"] is None and loop.by_outcome([*older, rows[0]])[-1]["jod"] == rows[0]["jod"]
    assert "| - | - | 34.95 | - | 0.100 |" in loop.table(loop.by_outcome(older))
