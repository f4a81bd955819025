"""The stage `strengthen` by itself: photos of generated people whose faces the judge still knows, without Ray."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from pipelines.archive.listing import list_source, source_table
from pipelines.config.load import ConfigError, load_config
from pipelines.config.names import NO_LOOP
from pipelines.config.sections import Config
from pipelines.networks import fingerprints
from pipelines.stages import strengthen, treatments
from pipelines.stages.declaration import load
from pipelines.stages.rows import to_table
from scol_ops import refinement

# One network that is cheap, and steps so large that three of them show.
SETTINGS = [
    "refine.identity=mobilefacenet", "refine.lr=0.05", "refine.residual_sigma=0", "refine.limit=0", "refine.seen=0.5",
    "refine.hinge=1", "refine.draws=1", "refine.id_lock=0", "mask.scale=1", "mask.features=1", "attack.enabled=false",
    "engine.threads=1", "engine.device=cpu", "strengthen.rounds=2", "strengthen.steps=3", "strengthen.looks=2",
    "publish.max_ism=-1", "publish.min_jod=0", "publish.distortions=half",
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


def strengthened(table: pa.Table, *more: str) -> list[dict]:
    return strengthen.operator(settings(*more), "w", None)(table).to_pylist()


@pytest.fixture(scope="module")
def weak(table: pa.Table) -> list[dict]:
    """The loop where no face can reach the bar, and none shows too much."""
    return strengthened(table)


@pytest.fixture(scope="module")
def changed(table: pa.Table, weak: list[dict]) -> pa.Table:
    """The stage's table with faces as strong rounds left them: there is a change to have a share of."""
    place = table.schema.get_field_index("protected")
    return table.set_column(place, "protected", pa.array([row["protected"] for row in weak]))


def test_a_face_that_is_known_goes_back_and_is_known_less(weak: list[dict]) -> None:
    for row in weak:
        assert row["status"] == "ok" and row["ism_before"] > 0.95 and row["ism_worst_before"] >= row["ism_before"]
        assert row["ism_worst"] < row["ism_worst_before"] - 0.3 and row["ism_worst"] >= row["ism"]
        assert (row["rounds"], row["ended"], row["share"]) == (2, "rounds", 1) and row["kept"] in (1, 2)
        # The whole neither hides nor shows too much, so no share of it is looked at.
        assert [(look["round"], look["share"]) for look in row["looks"]] == [(0, 1), (1, 1), (2, 1)]
        assert row["ism_worst"] == pytest.approx(min(look["ism_worst"] for look in row["looks"]), abs=0.01)
        assert row["psnr_before"] > 40 > row["psnr"] > 20 and row["protected"] and row["seconds"] > 0
        assert row["jod_before"] == row["looks"][0]["jod"] > 9.5 > row["jod"] > 0


def test_the_same_again_is_the_same(table: pa.Table, weak: list[dict]) -> None:
    again = strengthened(table)
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in weak]


def published(table: pa.Table, rows: list[dict], out: Path, *more: str) -> list[dict]:
    """Rows of ``publish`` after these of ``strengthen``."""
    came = to_table("strengthen", rows).select(table.column_names[:8])
    for name in table.column_names:
        if name.startswith(("align.", "source.")):
            came = came.append_column(name, table[name])
    came = came.append_column("attack.protected", table["protected"])
    place = out / hashlib.md5(repr(more).encode()).hexdigest()
    return load("publish", settings(*more), "w", str(place))(came).to_pylist()


def test_what_was_judged_is_what_is_published(table: pa.Table, weak: list[dict], tmp_path: Path) -> None:
    told = "publish.judge_distorted=false"
    for row, before in zip(published(table, weak, tmp_path, told), weak, strict=True):
        assert [row[name] for name in ("ism", "ism_worst", "worst")] == [
            before[name] for name in ("ism", "ism_worst", "worst")
        ]
        assert row["jod"] == pytest.approx(before["jod"], abs=1e-5)
        assert row["distorted"][0]["name"] == "half" and row["status"] == "weak" and row["max_ism_distorted"] is None
        assert row["reason"].startswith("WEAK_IDENTITY: faceres sees cosine")
    half = min(row["distorted"][0]["ism"] for row in published(table, weak, tmp_path))
    bars = ["publish.max_ism=1", f"publish.max_ism_distorted={half - 1e-4}"]
    rows = published(table, weak, tmp_path, *bars, told)
    assert all(row["status"] == "ok" for row in rows), "what is only told does not decide"
    for row in published(table, weak, tmp_path, *bars, "publish.judge_distorted=true"):
        assert row["status"] == "weak" and row["max_ism_distorted"] == pytest.approx(half, abs=1e-3)
        assert row["reason"].startswith("WEAK_DISTORTED: faceres sees after half cosine")


def test_what_the_judge_sees_after_a_transformation_sends_a_face_back(table: pa.Table, weak: list[dict]) -> None:
    bars = ["publish.max_ism=1", "publish.max_ism_distorted=-1"]
    rows = strengthened(table, *bars)
    assert [row["rounds"] for row in rows] == [2, 2]
    assert [row["protected"] for row in rows] == [row["protected"] for row in weak], "the same rounds"
    rows = strengthened(table, *bars, "publish.distortions=[]", "strengthen.looks=0")
    assert [row["rounds"] for row in rows] == [0, 0]


def test_the_first_round_that_hides_a_face_is_the_last(table: pa.Table, weak: list[dict]) -> None:
    bar = max(row["looks"][1]["ism_worst"] for row in weak) + 1e-4
    rows = strengthened(table, f"publish.max_ism={bar}", "strengthen.looks=0")
    assert [(row["rounds"], row["kept"], row["share"], row["ended"]) for row in rows] == [(1, 1, 1, "passed")] * 2


def test_a_bar_that_is_easy_takes_a_share_which_shows_less(changed: pa.Table, weak: list[dict]) -> None:
    """A bar halfway between the photo's cosine and that of the whole change."""
    bar = max((row["ism_worst_before"] + row["ism_worst"]) / 2 for row in weak)
    rows = strengthened(changed, f"publish.max_ism={bar}", "strengthen.looks=3")
    for row, before in zip(rows, weak, strict=True):
        assert (row["rounds"], row["kept"], row["ended"]) == (0, 0, "passed") and row["protected"]
        assert row["share"] < 1 and row["share"] * 8 == round(row["share"] * 8)
        assert row["ism_worst"] <= bar and row["jod"] > row["jod_before"] + 0.2 and row["psnr"] > row["psnr_before"]
        assert row["jod_before"] == pytest.approx(before["jod"], abs=0.05), "the whole, as it came"
        looks = row["looks"]
        assert [look["round"] for look in looks] == [0, 0, 0, 0] and looks[0]["share"] == 1
        assert row["share"] == min(look["share"] for look in looks if look["ism_worst"] <= bar)
        assert {look["share"] for look in looks if look["share"] < row["share"]} <= {
            look["share"] for look in looks if look["ism_worst"] > bar
        }
    # A face that is hidden by the least share that it looks at has it; with no looks the change stays whole.
    for looks in (0, 2):
        least = strengthened(changed, "publish.max_ism=1", f"strengthen.looks={looks}")
        assert [(row["share"], row["ended"], len(row["looks"])) for row in least] == [
            (0.5**looks, "passed", looks + 1)
        ] * 2
        assert all((row["protected"] is None) == (looks == 0) for row in least)


def test_what_shows_too_much_is_told_as_weak_and_not_published_so(
    table: pa.Table, changed: pa.Table, weak: list[dict], tmp_path: Path
) -> None:
    """No face can be hidden: it gets the largest share that may be seen, and nobody makes a stronger change of it."""
    bar = max(row["jod"] for row in weak) + 0.5
    rows = strengthened(changed, f"publish.min_jod={bar}", "strengthen.looks=3")
    for row in rows:
        assert (row["rounds"], row["ended"]) == (0, "sight") and row["jod_before"] < bar <= row["jod"]
        unseen = [look for look in row["looks"] if look["jod"] >= bar]
        assert row["share"] == max(look["share"] for look in unseen) < 1
        assert len(row["looks"]) == 4 and len(unseen) < 4
    # A bar that no change of pixels meets: the smallest share, and the verdict says why it is weak.
    rows = strengthened(changed, "publish.min_jod=10", "publish.max_ism=1")
    assert [(row["ended"], row["share"]) for row in rows] == [("sight", 0.25)] * 2
    for row in published(changed, rows, tmp_path, "publish.min_jod=10", "publish.max_ism=1"):
        assert row["status"] == "weak" and row["reason"].startswith("WEAK_LOOK: JOD ")


def test_a_round_that_shows_too_much_gives_way_to_what_was_there(table: pa.Table, weak: list[dict]) -> None:
    """The first round shows more than it may and has no share to fall back on."""
    bar = max(row["looks"][1]["jod"] for row in weak) + 0.05
    assert bar < min(row["jod_before"] for row in weak)
    for row in strengthened(table, f"publish.min_jod={bar}", "strengthen.looks=0"):
        assert (row["rounds"], row["kept"], row["protected"], row["ended"]) == (1, 0, None, "sight")
        assert row["jod"] == pytest.approx(row["jod_before"], abs=0.01) and row["jod"] >= bar
    # With looks, a share of it: it hides more than the photo as it came, and may be seen.
    for row in strengthened(table, f"publish.min_jod={bar}", "strengthen.looks=3"):
        assert (row["rounds"], row["kept"], row["ended"]) == (1, 1, "sight") and row["share"] < 1
        assert row["jod"] >= bar and row["ism_worst"] < row["ism_worst_before"] - 0.02


def test_rounds_that_bring_the_identity_back_are_not_kept(changed: pa.Table, weak: list[dict]) -> None:
    """Without the hinge the refinement only takes back; what came is the best then, and what is told is of it."""
    rows = strengthened(changed, "refine.hinge=0", "refine.seen=5")
    for row, before in zip(rows, weak, strict=True):
        assert (row["rounds"], row["kept"], row["ended"], row["protected"]) == (2, 0, "rounds", None)
        assert row["looks"][2]["ism"] > row["ism"] == row["ism_before"] == before["ism"]


def test_a_round_that_diverges_is_the_last(table: pa.Table, weak: list[dict], monkeypatch) -> None:
    real = refinement.refine

    def refine(*arguments, **more):
        if arguments[6].seen < 0.5 / 2 - 1e-6:  # beyond the first round
            raise FloatingPointError("loss nan")
        return real(*arguments, **more)

    monkeypatch.setattr(treatments, "refine", refine)
    for row, free in zip(strengthened(table), weak, strict=True):
        assert (row["status"], row["rounds"], row["kept"], row["ended"]) == ("ok", 2, 1, "diverged")
        assert row["looks"] == free["looks"][:2]


def test_looks_without_rounds_load_no_network_but_the_judge(changed: pa.Table, monkeypatch) -> None:
    def refuse(*arguments):
        raise AssertionError("not needed")

    for name in ("Refiner", "Attacker"):
        monkeypatch.setattr(strengthen, name, refuse)
    rows = strengthened(changed, "strengthen.rounds=0", "publish.max_ism=1", "attack.enabled=true")
    assert [(row["rounds"], row["share"], row["ended"]) for row in rows] == [(0, 0.25, "passed")] * 2
    assert all(row["ended"] == "rounds" for row in strengthened(changed, "strengthen.rounds=0"))


def test_the_key_names_the_networks_that_the_loop_goes_by() -> None:
    def named(*more: str) -> set[str]:
        found = fingerprints.stage_weights(settings(*more), "g")["strengthen"]
        return {word.split(":")[0] for word in found.split(",") if word}

    assert named() == {"faceres", "mobilefacenet"} and named("strengthen.rounds=0") == {"faceres"}
    assert named("attack.enabled=true") == {"faceres", "mobilefacenet", "encoder"}
    assert named("attack.enabled=true", "strengthen.rounds=0") == {"faceres"} and not named(*NO_LOOP)
    assert "mobilestylegan-256" in named("refine.id_lock=1")


def test_time_is_limited_and_a_photo_that_has_changed_is_not_judged(table: pa.Table, tmp_path: Path) -> None:
    for row in strengthened(
        table, "engine.face_seconds=3", "strengthen.steps=5000"
    ):  # what was judged before is what is published
        assert (row["status"], row["ended"], row["rounds"], row["kept"]) == ("ok", "time", 1, 0)
        assert row["protected"] is None and row["ism_worst"] == row["ism_worst_before"]

    Image.new("RGB", (50, 50)).save(tmp_path / "other.png")
    place = table.schema.get_field_index("source.url")
    moved = table.set_column(place, "source.url", pa.array([str(tmp_path / "other.png")] * 2))
    for row in strengthened(moved):
        assert row["status"] == "error" and row["reason"].startswith("CHANGED: ")


def test_photos_that_will_not_be_published_are_passed_on(table: pa.Table) -> None:
    place = table.schema.get_field_index("status")
    broken = table.set_column(place, "status", pa.array(["ok", "error"]))
    rows = strengthened(broken)
    assert [row["status"] for row in rows] == ["ok", "error"] and all(row["rounds"] is None for row in rows)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["refine.steps=0"], "strengthen.rounds: neither refinement nor attack"),
        (["refine.identity=[]"], "strengthen.rounds: neither refinement nor attack"),
        (["strengthen.steps=0"], "strengthen.rounds: neither refinement nor attack"),
        (["strengthen.looks=17"], "strengthen.looks: .*less than or equal to 16"),
        (["strengthen.seen_factor=0.5"], "strengthen.seen_factor: .*greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense(sets: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(*sets)
