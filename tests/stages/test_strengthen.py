"""The stage `strengthen` by itself: photos of generated people whose faces the judge still knows, without Ray."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from pipelines.archive.listing import list_source, source_table
from pipelines.config.load import ConfigError, load_config
from pipelines.config.sections import Config
from pipelines.stages import strengthen, treatments
from pipelines.stages.declaration import load
from pipelines.stages.rows import to_table
from scol_ops import refinement

# One network that is cheap, and steps so large that three of them show.
SETTINGS = [
    "refine.identity=mobilefacenet", "refine.lr=0.05", "refine.residual_sigma=0", "attack.enabled=false",
    "engine.threads=1", "engine.device=cpu", "strengthen.rounds=2", "strengthen.steps=3", "strengthen.min_psnr=10",
    "publish.max_ism=-1", "publish.distortions=half",
]  # fmt: skip


def settings(*more: str) -> Config:
    return load_config("quick", sets=[*SETTINGS, *more])


@pytest.fixture(scope="module")
def table(draw_photo, tmp_path_factory) -> pa.Table:
    """What the stage gets for a JPEG with two faces that nothing was done to yet."""
    folder = tmp_path_factory.mktemp("photos")
    Image.fromarray(draw_photo([102, 103], width=600)).save(folder / "two.jpg", quality=92)
    source = source_table(list_source(str(folder)).photos)
    aligned = load("align", settings(), "w")(source)
    found = aligned.select(["key", "photo_id", "face_id", "status", "reason", "failed_stage", "seed"])
    found = found.append_column("protected", aligned["crop"])
    for name in ("content", "crop", "landmarks", "box", "quad", "width", "height"):
        found = found.append_column(f"align.{name}", aligned[name])
    for name in ("url", "path"):
        found = found.append_column(f"source.{name}", pa.array([source[name][0].as_py()] * len(found)))
    assert len(found) == 2
    return found


@pytest.fixture(scope="module")
def weak(table: pa.Table) -> list[dict]:
    """The loop where no face can reach the bar."""
    return strengthen.operator(settings(), "w", None)(table).to_pylist()


def test_a_face_that_is_known_goes_back_and_is_known_less(weak: list[dict]) -> None:
    for row in weak:
        assert row["status"] == "ok" and row["ism_before"] > 0.95 and row["ism_worst_before"] >= row["ism_before"]
        assert row["ism_worst"] < row["ism_worst_before"] - 0.3 and row["ism_worst"] >= row["ism"]
        assert (row["rounds"], row["ended"]) == (2, "rounds") and row["kept"] in (1, 2)
        assert [entry["round"] for entry in row["history"]] == [0, 1, 2]
        assert row["ism_worst"] == pytest.approx(min(entry["ism_worst"] for entry in row["history"]), abs=0.01)
        assert row["psnr_before"] > 40 > row["psnr"] > 20 and row["protected"] and row["seconds"] > 0


def test_the_same_again_is_the_same(table: pa.Table, weak: list[dict]) -> None:
    again = strengthen.operator(settings(), "w", None)(table).to_pylist()
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in weak]


def test_what_was_judged_is_what_is_published(table: pa.Table, weak: list[dict], tmp_path: Path) -> None:
    published = to_table("strengthen", weak).select(table.column_names[:8])
    for name in table.column_names:
        if name.startswith(("align.", "source.")):
            published = published.append_column(name, table[name])
    published = published.append_column("attack.protected", table["protected"])

    def publish(*more: str) -> list[dict]:
        out = str(tmp_path / hashlib.md5(repr(more).encode()).hexdigest())
        return load("publish", settings(*more), "w", out)(published).to_pylist()

    told = "publish.judge_distorted=false"
    for row, before in zip(publish(told), weak, strict=True):
        assert (row["ism"], row["ism_worst"], row["worst"]) == (before["ism"], before["ism_worst"], before["worst"])
        assert row["distorted"][0]["name"] == "half" and row["status"] == "weak" and row["max_ism_distorted"] is None
        assert row["reason"].startswith("WEAK_IDENTITY: faceres sees cosine")
    half = min(row["distorted"][0]["ism"] for row in publish())
    bars = ["publish.max_ism=1", f"publish.max_ism_distorted={half - 1e-4}"]
    assert all(row["status"] == "ok" for row in publish(*bars, told)), "what is only told does not decide"
    for row in publish(*bars, "publish.judge_distorted=true"):
        assert row["status"] == "weak" and row["max_ism_distorted"] == pytest.approx(half, abs=1e-3)
        assert row["reason"].startswith("WEAK_DISTORTED: faceres sees after half cosine")


def test_what_the_judge_sees_after_a_transformation_sends_a_face_back(table: pa.Table, weak: list[dict]) -> None:
    bars = ["publish.max_ism=1", "publish.max_ism_distorted=-1"]
    rows = strengthen.operator(settings(*bars), "w", None)(table).to_pylist()
    assert [row["rounds"] for row in rows] == [2, 2]
    assert [row["protected"] for row in rows] == [row["protected"] for row in weak], "the same rounds"
    nowhere = settings(*bars, "publish.distortions=[]")
    assert [row["rounds"] for row in strengthen.operator(nowhere, "w", None)(table).to_pylist()] == [0, 0]


def test_a_face_below_its_bars_is_left_alone_and_the_first_round_below_them_ends_it(
    table: pa.Table, weak: list[dict]
) -> None:
    rows = strengthen.operator(settings("publish.max_ism=1"), "w", None)(table).to_pylist()
    for row in rows:
        assert (row["rounds"], row["kept"], row["ended"], row["protected"]) == (0, 0, "passed", None)
        assert row["ism"] == row["ism_before"] and len(row["history"]) == 1
    # a bar that both reach in the first round
    bar = max(row["history"][1]["ism_worst"] for row in weak) + 1e-4
    rows = strengthen.operator(settings(f"publish.max_ism={bar}"), "w", None)(table).to_pylist()
    assert [(row["rounds"], row["kept"], row["ended"]) for row in rows] == [(1, 1, "passed")] * 2


def test_rounds_that_bring_the_identity_back_are_not_kept(table: pa.Table, weak: list[dict]) -> None:
    """Without the hinge the refinement only pulls to the photo; what came is the best then, and what is told is of it."""
    place = table.schema.get_field_index("protected")
    came = table.set_column(place, "protected", pa.array([row["protected"] for row in weak]))
    for row, before in zip(strengthen.operator(settings("refine.hinge=0"), "w", None)(came).to_pylist(), weak, strict=True):
        assert (row["rounds"], row["kept"], row["ended"], row["protected"]) == (2, 0, "rounds", None)
        assert row["history"][2]["ism"] > row["ism"] == row["ism_before"] == before["ism"]


def test_a_round_that_diverges_is_the_last(table: pa.Table, weak: list[dict], monkeypatch) -> None:
    real = refinement.refine

    def refine(*arguments, **more):
        if arguments[6].hinge > 0.35 * 1.6 + 1e-6:  # beyond the first round
            raise FloatingPointError("loss nan")
        return real(*arguments, **more)

    monkeypatch.setattr(treatments, "refine", refine)
    for row, free in zip(strengthen.operator(settings(), "w", None)(table).to_pylist(), weak, strict=True):
        assert (row["status"], row["rounds"], row["kept"], row["ended"]) == ("ok", 2, 1, "diverged")
        assert row["history"] == free["history"][:2]


def test_a_round_below_the_stated_quality_is_faded_to_it_and_the_last(table: pa.Table, weak: list[dict]) -> None:
    floor = min(row["history"][1]["psnr"] for row in weak) - 0.01
    rows = strengthen.operator(settings(f"strengthen.min_psnr={floor}"), "w", None)(table).to_pylist()
    assert all(row["psnr"] >= floor for row in rows)
    for row, free in zip(rows, weak, strict=True):
        below = [entry["psnr"] < floor for entry in free["history"]]
        assert row["ended"] == "quality" and row["rounds"] == below.index(True)
        assert floor <= row["history"][-1]["psnr"] < floor + 0.1
    floor = max(row["history"][1]["psnr"] for row in weak) + 2
    rows = strengthen.operator(settings(f"strengthen.min_psnr={floor}"), "w", None)(table).to_pylist()
    for row, free in zip(rows, weak, strict=True):
        assert (row["rounds"], row["kept"], row["ended"]) == (1, 1, "quality") and floor <= row["psnr"] < floor + 0.4
        assert free["history"][1]["ism_worst"] < row["ism_worst"] < row["ism_worst_before"] - 0.05
    high = strengthen.operator(settings("strengthen.min_psnr=60"), "w", None)(table).to_pylist()
    assert all(row["ended"] == "quality" and row["psnr"] >= 60 for row in high)


def test_time_is_limited_and_a_photo_that_has_changed_is_not_judged(table: pa.Table, tmp_path: Path) -> None:
    slow = settings("engine.face_seconds=2", "strengthen.steps=5000")
    rows = strengthen.operator(slow, "w", None)(table).to_pylist()
    for row in rows:  # what was judged before is what is published
        assert (row["status"], row["ended"], row["rounds"], row["kept"]) == ("ok", "time", 1, 0)
        assert row["protected"] is None and row["ism_worst"] == row["ism_worst_before"]

    Image.new("RGB", (50, 50)).save(tmp_path / "other.png")
    place = table.schema.get_field_index("source.url")
    moved = table.set_column(place, "source.url", pa.array([str(tmp_path / "other.png")] * 2))
    for row in strengthen.operator(settings(), "w", None)(moved).to_pylist():
        assert row["status"] == "error" and row["reason"].startswith("CHANGED: ")


def test_photos_that_will_not_be_published_are_passed_on(table: pa.Table) -> None:
    place = table.schema.get_field_index("status")
    broken = table.set_column(place, "status", pa.array(["ok", "error"]))
    rows = strengthen.operator(settings(), "w", None)(broken).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "error"] and all(row["rounds"] is None for row in rows)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["refine.steps=0"], "strengthen.rounds: neither refinement nor attack"),
        (["refine.identity=[]"], "strengthen.rounds: neither refinement nor attack"),
        (["publish.min_psnr=33", "strengthen.min_psnr=32"], "strengthen.min_psnr: 32 dB is below publish.min_psnr"),
    ],
)
def test_settings_that_make_no_sense(sets: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(*sets)
