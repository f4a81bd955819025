"""Schemas, readers, and the stages' common shell, without networks."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster import hash_key
from pipelines.archive.listing import list_source, source_table
from pipelines.config.load import load_config
from pipelines.config.names import NO_LOOP, STAGES
from pipelines.config.sections import Config
from pipelines.jobs.renewal import renewal
from pipelines.run import folder, schemas, summary, tables
from pipelines.run.folder import Run, RunError
from pipelines.run.keys import derive, stage_rules
from pipelines.run.schemas import CODE_DIM, CODE_LAYERS, SCHEMAS, face_id, row_seed
from pipelines.run.tables import read_photos, read_stage
from pipelines.stages.crops import as_codes, as_vector, decode_png, encode_png, geometry_in_crop
from pipelines.stages.rows import FaceError, each_face, error_rows, iterate, to_table
from scol_ops.tuning import DeadlineExceeded

PHOTOS = ("a", "b", "c", "d")


def plan_of(keys: dict[str, str]) -> pa.Table:
    """A plan in which a photo has the same key at all stages."""
    columns = {"photo_id": list(keys), "path": [f"{p}.jpg" for p in keys]}
    return pa.table(columns | {stage: list(keys.values()) for stage in ("source", *STAGES)})


def publish_row(photo: str, index: int | None, status: str, **more) -> dict:
    name = None if index is None else face_id(photo, index)
    return {"key": hash_key(photo), "photo_id": photo, "face_id": name, "status": status, "path": f"{photo}.jpg"} | more


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Four photos: two faces (ok and weak), no face, failed, not come so far; and rows of an older configuration."""
    run = Run(str(tmp_path / "run"))
    run.write_plan(plan_of({p: hash_key(p) for p in PHOTOS}))
    rows = [
        publish_row("a", 0, "ok", action="protected", psnr=34.0, ism=0.2, judge="faceres", max_ism=0.545),
        publish_row(
            "a",
            1,
            "weak",
            action="protected",
            psnr=30.0,
            ism=0.6,
            judge="faceres",
            max_ism=0.545,
            reason="WEAK_IDENTITY: x",
            failed_stage="publish",
        ),
        publish_row("b", None, "no_face", action="copied"),
        publish_row("c", None, "error", action="none", reason="TRUNCATED: y", failed_stage="align"),
    ]
    old = publish_row("a", 0, "error") | {"key": hash_key("older")}
    for part in (rows[:2], rows[2:], [old]):
        run.store.write_part("publish", None, to_table("publish", part))
    return run


def test_only_rows_that_count_are_read(run: Run) -> None:
    table = read_stage(run, "publish", ["photo_id", "status"])
    assert table.to_pylist() == [
        {"photo_id": "a", "status": "ok"},
        {"photo_id": "a", "status": "weak"},
        {"photo_id": "b", "status": "no_face"},
        {"photo_id": "c", "status": "error"},
    ]
    pieces = list(tables.scan_stage(run, "publish", ["photo_id", "status"], photos=1))
    assert len(pieces) == 3 and pa.concat_tables(pieces).equals(table)
    assert read_stage(run, "tune").schema == SCHEMAS["tune"] and read_stage(run, "tune").num_rows == 0
    with pytest.raises(RunError, match="no stage"):
        read_stage(run, "tuning")


def test_a_photo_is_as_its_worst_face(run: Run) -> None:
    rows = {row["photo_id"]: row for row in read_photos(run).to_pylist()}
    assert {p: row["status"] for p, row in rows.items()} == {"a": "weak", "b": "no_face", "c": "error", "d": "pending"}
    assert rows["a"]["faces"] == 2 and rows["a"]["reason"] == "WEAK_IDENTITY: x" and rows["b"]["faces"] == 0


def test_summary_counts_photos_once(run: Run) -> None:
    found = summary.summary(run)
    assert {
        k: found[k] for k in ("photos", "faces", "ok", "weak", "no_face", "error", "pending", "published", "copied")
    } == {
        "photos": 4,
        "faces": 2,
        "ok": 0,
        "weak": 1,
        "no_face": 1,
        "error": 1,
        "pending": 1,
        "published": 1,
        "copied": 1,
    }
    assert found["face_status"] == {"ok": 1, "weak": 1, "error": 0}
    assert found["psnr"] == 32.0 and found["spread"]["psnr"]["max"] == 34.0 and found["ism"] == 0.4
    assert [found["spread"]["psnr"][name] for name in ("p5", "p95")] == pytest.approx([30.2, 33.8])
    assert found["ssim"] is None and found["judge"] == "faceres"
    assert found["reasons"] == {"TRUNCATED": 1, "WEAK_IDENTITY": 1}


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    for call in (lambda: read_stage(str(tmp_path), "tune"), lambda: Run(str(tmp_path / "x")).read_json("run.json")):
        with pytest.raises(RunError, match="no run of scol"):
            call()
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(RunError, match="not JSON"):
        Run(str(tmp_path)).read_json("summary.json")


def test_every_stage_begins_with_the_common_columns() -> None:
    common = [f.name for f in schemas.COMMON]
    for stage in STAGES:
        assert SCHEMAS[stage].names[: len(common)] == common
    document = (Path(__file__).parents[2] / "docs" / "manifests.md").read_text(encoding="utf-8")
    for stage, schema in SCHEMAS.items():
        section = document.split(f"\n## {stage}\n")[1].split("\n## ")[0]
        for field in schema if stage == "source" else list(schema)[len(common) :]:
            assert f"| `{field.name}` | {schemas.type_words(field.type)} |" in section, (stage, field)


def test_seeds_depend_on_run_and_face_alone() -> None:
    seeds = {row_seed(run, face_id(photo, i)) for run in (0, 1) for photo in PHOTOS for i in range(3)}
    assert len(seeds) == 24 and all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(0, "0123456789abcdef-00") == row_seed(0, "0123456789abcdef-00")


# ---- rows through a stage --------------------------------------------------------------------------------------------


def test_rows_survive_arrow() -> None:
    code = torch.randn(1, CODE_LAYERS, CODE_DIM, generator=torch.Generator().manual_seed(0))
    rows = [
        {"key": "k", "photo_id": "p", "face_id": "p-00", "status": "ok", "code": as_vector(code), "psnr": 21.5},
        {"key": "k", "photo_id": "p", "face_id": "p-01", "status": "error", "reason": "X: y", "failed_stage": "align"},
    ]
    first, second = iterate(to_table("invert", rows))
    assert torch.equal(as_codes(first["code"]), code) and first["psnr"] == 21.5
    assert second["code"] is None and second["reason"] == "X: y"
    sliced = list(iterate(to_table("invert", rows).slice(1)))
    assert len(sliced) == 1 and sliced[0]["face_id"] == "p-01"


def test_pictures_survive_png_to_half_a_level() -> None:
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    again = decode_png(encode_png(picture))
    assert again.shape == picture.shape and float((again - picture).abs().max()) <= 0.5 / 127.5 + 1e-6
    assert torch.equal(decode_png(encode_png(again)), again)


def test_geometry_in_the_crop() -> None:
    # A crop of 64 px whose quad is a square of 128 px with its corner at (10, 20): a pixel of it is two of the photo.
    quad = np.array([[9.5, 19.5], [9.5, 147.5], [137.5, 147.5], [137.5, 19.5]])
    row = {
        "quad": quad.reshape(-1),
        "landmarks": np.tile([9.5 + 64, 19.5 + 32], 5),
        "box": np.array([9.5, 19.5, 137.5, 83.5]),
    }
    landmarks, box = geometry_in_crop(row, 64, torch.device("cpu"))
    assert torch.allclose(landmarks, torch.tensor([31.5, 15.5]).expand(1, 5, 2), atol=1e-4)
    assert torch.allclose(box, torch.tensor([[-0.5, -0.5, 63.5, 31.5]]), atol=1e-4)


def face_rows() -> pa.Table:
    return to_table(
        "fuse",
        [
            {"key": "k1", "photo_id": "p", "face_id": "p-00", "status": "ok", "seed": 1},
            {
                "key": "k1",
                "photo_id": "p",
                "face_id": "p-01",
                "status": "error",
                "reason": "DIVERGED: z",
                "failed_stage": "invert",
            },
            {"key": "k2", "photo_id": "q", "face_id": None, "status": "no_face", "failed_stage": "align"},
            {"key": "k3", "photo_id": "r", "face_id": "r-00", "status": "ok", "seed": 2},
        ],
    )


def test_each_face_carries_what_is_not_well_and_catches_what_fails() -> None:
    seen = []

    def treat(row, deadline):
        seen.append(row["face_id"])
        if row["face_id"] == "r-00":
            raise FaceError("TOO_ODD", "an odd face")
        return {"psnr": 30.0, "tuned": b"x"}

    rows = each_face("tune", face_rows(), "w:1", 60, treat).to_pylist()
    assert seen == ["p-00", "r-00"]
    assert [(r["status"], r["reason"], r["failed_stage"]) for r in rows] == [
        ("ok", None, None),
        ("error", "DIVERGED: z", "invert"),
        ("no_face", None, "align"),
        ("error", "TOO_ODD: an odd face", "tune"),
    ]
    assert rows[0]["psnr"] == 30.0 and rows[3]["tuned"] is None and {r["weights"] for r in rows} == {"w:1"}
    assert [r["key"] for r in rows] == ["k1", "k1", "k2", "k3"] and [r["seed"] for r in rows] == [1, None, None, 2]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("two\nlines"), "EXCEPTION: ValueError: two lines"),
        (FloatingPointError("nan"), "DIVERGED: nan"),
        (DeadlineExceeded("step 3 of 9"), "TIMEOUT: step 3 of 9"),
    ],
)
def test_reasons_of_exceptions(error: Exception, reason: str) -> None:
    def treat(row, deadline):
        raise error

    assert each_face("tune", face_rows(), "", 60, treat).to_pylist()[0]["reason"] == reason


def test_a_face_over_its_time_is_ended_and_the_next_one_is_treated() -> None:
    def treat(row, deadline):
        if row["face_id"] == "p-00":
            while True:  # looks at no deadline
                time.sleep(0.01)
        return {"psnr": 30.0}

    begin = time.monotonic()
    rows = each_face("tune", face_rows(), "", 0.3, treat).to_pylist()
    assert time.monotonic() - begin < 5
    assert rows[0]["reason"].startswith("TIMEOUT") and rows[3]["status"] == "ok"


def test_error_rows_of_the_engine_keep_earlier_reasons() -> None:
    rows = error_rows("tune", 0, face_rows(), "WORKER_DIED: x").to_pylist()
    assert [r["reason"] for r in rows] == ["WORKER_DIED: x", "DIVERGED: z", None, "WORKER_DIED: x"]
    assert [r["status"] for r in rows] == ["error", "error", "no_face", "error"]
    source = pa.table(
        {"key": ["k"], "photo_id": ["p"], "path": ["p.jpg"], "status": ["ok"], "reason": pa.nulls(1, pa.string())}
    )
    (row,) = error_rows("align", 0, source, "TIMEOUT: x").to_pylist()
    assert row["face_id"] is None and row["failed_stage"] == "align" and row["seed"] == row_seed(0, "p")


# ---- keys ------------------------------------------------------------------------------------------------------------

WEIGHTS = {stage: f"{stage}:1" for stage in STAGES}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (folder / name).write_bytes(name.encode())
    (folder / "notes.txt").write_text("x")
    return folder


def stage_keys(source: pa.Table, config: Config, *more) -> dict[str, list[str]]:
    return derive(stage_rules(config, *more), source["key"].to_pylist())


def loop(*more: str) -> Config:
    return load_config(sets=["strengthen.rounds=1", *more])


def test_keys_change_from_the_stage_concerned_on(archive: Path) -> None:
    source = source_table(list_source(str(archive)).photos)
    base = stage_keys(source, loop(), WEIGHTS, "/out")
    every = [key for stage in STAGES for key in base[stage]]
    assert len(set(every)) == len(every) == 3 * len(STAGES)

    def changed(keys: dict[str, list[str]]) -> list[str]:
        return [stage for stage in STAGES if keys[stage] != base[stage]]

    assert changed(stage_keys(source, loop(), WEIGHTS, "/out")) == []
    assert changed(stage_keys(source, loop("tune.steps=1"), WEIGHTS, "/out")) == [
        "tune",
        "attack",
        "strengthen",
        "publish",
    ]
    assert changed(stage_keys(source, loop(), WEIGHTS | {"fuse": "g"}, "/out"))[0] == "fuse"
    assert changed(stage_keys(source, loop(), WEIGHTS, "/elsewhere")) == ["publish"]
    assert changed(stage_keys(source, loop("engine.workers=7"), WEIGHTS, "/out")) == []

    bar = ["strengthen", "publish"]
    assert changed(stage_keys(source, loop("publish.max_ism=0.3"), WEIGHTS, "/out")) == bar
    assert changed(stage_keys(source, loop("strengthen.steps=5"), WEIGHTS, "/out")) == bar
    assert changed(stage_keys(source, loop("publish.judge_distorted=false"), WEIGHTS, "/out")) == ["publish"]

    (archive / "b.jpg").write_bytes(b"other content")
    again = stage_keys(source_table(list_source(str(archive)).photos), loop(), WEIGHTS, "/out")
    for stage in STAGES:
        assert [new == old for new, old in zip(again[stage], base[stage], strict=True)] == [True, False, True]


def test_a_stage_that_is_left_out_has_the_keys_of_the_one_before(archive: Path, tmp_path: Path) -> None:
    source = source_table(list_source(str(archive)).photos)
    off, without = NO_LOOP, [stage for stage in STAGES if stage != "strengthen"]
    keys = stage_keys(source, load_config(sets=off), WEIGHTS, "/out")
    looking = stage_keys(source, load_config(sets=["strengthen.rounds=0"]), WEIGHTS, "/out")
    assert looking["strengthen"] != looking["attack"] == keys["attack"], "looks alone are something to do"
    assert keys["strengthen"] == keys["attack"] and len(set(keys["publish"]) | set(keys["attack"])) == 6
    assert stage_keys(source, load_config(sets=[*off, "strengthen.steps=9"]), WEIGHTS, "/out") == keys
    run, columns = Run(str(tmp_path / "run")), [source["photo_id"], source["path"], source["key"], *keys.values()]
    run.write_plan(pa.table(columns, schemas.PLAN_SCHEMA), {"source": "/src"})
    assert folder.stages_of(run.plan()) == without
    # A plan that an older version wrote knows nothing of it.
    old = run.plan().drop_columns(["strengthen"])
    run.write_tables("plan.parquet", old.schema, [old])
    assert run.plan()["strengthen"] == old["attack"] and folder.stages_of(run.plan()) == without
    assert folder.plan_about(run.plan()) == {"source": "/src"}
    assert run.plan(["strengthen", "path"]).column_names == ["strengthen", "path"]
    with pytest.raises(RunError, match="no column stages"):
        run.plan(["stages"])


def test_samples_are_seeded_and_other_files_are_counted(archive: Path) -> None:
    listing = list_source(str(archive))
    assert [p.path for p in listing.photos] == ["a.jpg", "b.jpg", "c.jpg"] and listing.skipped == {"NOT_A_PHOTO": 1}
    samples = {tuple(p.path for p in list_source(str(archive), limit=2, seed=seed).photos) for seed in range(20)}
    assert len(samples) == 3 and all(list(s) == sorted(s) for s in samples)
    one, two = (list_source(str(archive), limit=2, seed=5) for _ in range(2))
    assert (
        one.photos == two.photos and len(one) == 2 and one.total == 3 and one.all_ids.tolist() == listing.ids.tolist()
    )


def test_photos_whose_output_is_gone_get_another_key(archive: Path, tmp_path: Path) -> None:
    run, out = Run(str(tmp_path / "run")), tmp_path / "out"
    out.mkdir()
    source = source_table(list_source(str(archive)).photos)
    keys = stage_keys(source, load_config(), WEIGHTS, str(out))["publish"]
    assert renewal(run, str(out))(keys) == keys

    def publish(key: str, path: str, action: str) -> None:
        size = 5 if action != "none" else None
        row = {"key": key, "photo_id": path, "status": "ok", "path": path, "action": action, "out_bytes": size}
        run.store.write_part("publish", None, to_table("publish", [row]))
        if size:
            (out / path).write_bytes(b"12345")

    publish(keys[0], "a.jpg", "protected")
    publish(keys[1], "b.jpg", "none")
    assert renewal(run, str(out))(keys) == keys, (
        "a.jpg is there, b.jpg was never meant to be, c.jpg is to do"
    )

    (out / "a.jpg").unlink()
    second = renewal(run, str(out))(keys)
    assert second[0] != keys[0] and second[1:] == keys[1:]
    publish(second[0], "a.jpg", "protected")
    assert renewal(run, str(out))(keys) == second
    (out / "a.jpg").write_bytes(b"1234567")
    third = renewal(run, str(out))(keys)
    assert third[0] not in (keys[0], second[0]) and third[1:] == keys[1:]


def test_with_verify_other_bytes_of_the_same_size_are_published_again(archive: Path, tmp_path: Path) -> None:
    run, out = Run(str(tmp_path / "run")), tmp_path / "out"
    out.mkdir()
    keys = [hash_key(name) for name in "abc"]
    for key, name in zip(keys, ("a.jpg", "b.jpg", "c.jpg"), strict=True):
        (out / name).write_bytes(name.encode())
        row = {"key": key, "photo_id": name, "status": "ok", "path": name, "action": "protected"}
        row |= {"out_bytes": 5, "sha256": hashlib.sha256(name.encode()).hexdigest()}
        run.store.write_part("publish", None, to_table("publish", [row]))
    (out / "b.jpg").write_bytes(b"B.JPG")
    assert renewal(run, str(out))(keys) == keys, "the size is the same"
    again = renewal(run, str(out), verify=True)(keys)
    assert [new == old for new, old in zip(again, keys, strict=True)] == [True, False, True]
