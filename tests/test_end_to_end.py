"""The whole job through Ray: an archive of generated people in, published files read back; resume; order."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps

from gallery_index import Gallery, GalleryMismatchError
from pipelines.archive.listing import list_source
from pipelines.archive.paths import photo_id
from pipelines.config.load import load_config
from pipelines.config.names import NO_LOOP
from pipelines.config.names import STAGES as ALL_STAGES
from pipelines.config.sections import Config
from pipelines.experiments import loop
from pipelines.jobs import gallery as gallery_jobs
from pipelines.jobs import run_gallery
from pipelines.jobs.protect import exit_status, protect
from pipelines.run.folder import Run
from pipelines.run.tables import read_photos, read_stage
from pipelines.stages import fuse

pytestmark = pytest.mark.usefixtures("ray_cluster")

STAGES = tuple(stage for stage in ALL_STAGES if stage != "strengthen")  # left out where there is nothing for it to do

# Few steps: what is tested here is the job, not how well it protects (docs/results.md measures that).
SETTINGS = [
    "tune.steps=2",
    "refine.steps=3",
    "refine.lr=0.03",
    "attack.enabled=true",
    "attack.steps=2",
    *NO_LOOP,
    "publish.min_jod=0",
    "gallery.synthetic=64",
    "fuse.k=3",
    "engine.workers=1",
    "engine.threads=1",
    "engine.device=cpu",
]


def settings(*more: str) -> Config:
    return load_config("quick", sets=[*SETTINGS, *more])


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.fixture(scope="module")
def archive(draw_photo, tmp_path_factory) -> Path:
    """Six files: PNG, sideways JPEG, two faces, a photo without a face, a broken file, and one that is no photo."""
    src = tmp_path_factory.mktemp("archive") / "photos"
    (src / "deep" / "er").mkdir(parents=True)
    Image.fromarray(draw_photo([100])).save(src / "one.png")
    sideways = Image.fromarray(np.rot90(draw_photo([101])).copy())  # turned left, so orientation 6 turns it right
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    sideways.save(src / "deep" / "sideways.jpg", quality=90, subsampling=0, exif=exif)
    Image.fromarray(draw_photo([102, 103], width=600)).save(src / "deep" / "er" / "zwei Gesichter ü.jpg", quality=92)
    ramp = np.linspace(60, 180, 240, dtype=np.uint8)
    Image.fromarray(np.stack([np.tile(ramp, (160, 1))] * 3, 2)).save(src / "landscape.jpg", quality=80)
    buffer = io.BytesIO()
    Image.fromarray(draw_photo([104])).save(buffer, "JPEG", quality=90)
    (src / "deep" / "broken.jpg").write_bytes(buffer.getvalue()[:2500])
    (src / "notes.txt").write_text("no photo")
    return src


@pytest.fixture(scope="module")
def first(archive: Path) -> dict:
    return protect(str(archive), str(archive.parent / "out"), settings())


@pytest.fixture(scope="module")
def run(archive: Path, first: dict) -> Run:
    return Run(str(archive.parent / "out.run"))


def test_every_photo_has_its_row_and_its_file(archive: Path, first: dict, run: Run) -> None:
    photos = {row["path"]: row for row in read_photos(run).to_pylist()}
    assert list(photos) == sorted(photos) and len(photos) == 5
    good = {"one.png": 1, "deep/sideways.jpg": 1, "deep/er/zwei Gesichter ü.jpg": 2}
    for path, faces in good.items():
        assert photos[path]["status"] in ("ok", "weak") and photos[path]["faces"] == faces, photos[path]
        assert photos[path]["action"] == "protected"
    assert (photos["landscape.jpg"]["status"], photos["landscape.jpg"]["action"]) == ("no_face", "copied")
    broken = photos["deep/broken.jpg"]
    assert (broken["status"], broken["action"], broken["failed_stage"]) == ("error", "none", "align")
    assert broken["reason"].startswith("TRUNCATED: ")
    out = archive.parent / "out"
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert found == {*good, "landscape.jpg"}

    assert {k: first[k] for k in ("photos", "faces", "no_face", "error", "pending", "published", "copied")} == {
        "photos": 5,
        "faces": 4,
        "no_face": 1,
        "error": 1,
        "pending": 0,
        "published": 3,
        "copied": 1,
    }
    assert first["ok"] + first["weak"] == 3 and first["skipped"] == {"NOT_A_PHOTO": 1}
    assert exit_status(first) == 1, "a photo failed"
    for stage in STAGES:
        rows = read_stage(run, stage, ["photo_id", "face_id", "status", "weights", "seed"]).to_pylist()
        assert len(rows) == 6 and sum(r["face_id"] is not None for r in rows) == 4, stage
        assert all(r["weights"] and r["seed"] is not None for r in rows), stage


def test_published_files_keep_what_they_were(archive: Path, first: dict) -> None:
    out = archive.parent / "out"
    assert (out / "landscape.jpg").read_bytes() == (archive / "landscape.jpg").read_bytes()
    before, after = pixels_of(archive / "one.png"), pixels_of(out / "one.png")
    changed = np.any(before != after, axis=2)
    # The face lies in a 256 px square in the middle of the photo; all around it is as it was, bit for bit.
    inside = np.zeros_like(changed)
    inside[42:298, 82:338] = True
    assert changed[inside].mean() > 0.1 and not changed[~inside].any()
    assert np.abs(before.astype(int) - after)[inside].mean() < 40

    with Image.open(out / "deep" / "sideways.jpg") as image:
        assert image.format == "JPEG" and image.size == (420, 340) and image.getexif()[0x0112] == 1
        assert image.getexif()[0x010E] == "a description"
    difference = pixels_of(out / "deep" / "sideways.jpg").astype(int) - pixels_of(archive / "deep" / "sideways.jpg")
    assert np.abs(difference[:30]).max() <= 3, "far from the face only the codec speaks, so it was turned once"


def test_measures_are_those_of_the_saved_file(archive: Path, first: dict, run: Run) -> None:
    from scol_ops.metrics import psnr

    rows = read_stage(run, "publish").to_pylist()
    for row in rows:
        if row["action"] == "none":
            continue
        data = Path(row["out_path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == row["sha256"] and len(data) == row["out_bytes"]
    faces = [row for row in rows if row["action"] == "protected"]
    for row in faces:
        assert 10 < row["psnr"] < 60 and 0.3 < row["ssim"] < 1 and 0 < row["flip"] < 0.8
        assert row["judge"] == "faceres" and row["ism"] == row["ism_faceres"] < 0.999
        known, later = row["ism"] > row["max_ism"], row["distorted"][0]["ism"] > row["max_ism_distorted"]
        assert (row["status"] == "weak") == (known or later)
        assert (row["reason"] or "").startswith(
            "WEAK_IDENTITY: faceres" if known else "WEAK_DISTORTED: faceres" if later else ""
        )
    # The PNG's crop can be measured from outside: its quad is nearly the square that the face was pasted into.
    row = next(r for r in faces if r["path"] == "one.png")
    before, after = (pixels_of(p)[42:298, 82:338] for p in (archive / "one.png", archive.parent / "out" / "one.png"))
    assert psnr(before, after) == pytest.approx(row["psnr"], abs=2.0)


def test_stages_did_their_work(first: dict, run: Run) -> None:
    tune = [r for r in read_stage(run, "tune").to_pylist() if r["status"] == "ok"]
    assert len(tune) == 4
    for row in tune:
        assert (row["tune_steps"], row["refine_steps"]) == (2, 3)
        phases = [entry["phase"] for entry in row["history"]]
        assert phases == ["tune"] * 2 + ["refine"] * 3 and row["tuned"] != row["refined"]
    fuse = [r for r in read_stage(run, "fuse").to_pylist() if r["status"] == "ok"]
    assert all(len(r["most_ids"]) == 3 and min(r["most_scores"]) > max(r["least_scores"]) for r in fuse)
    attack = [r for r in read_stage(run, "attack").to_pylist() if r["status"] == "ok"]
    assert all(0 < r["mask_share"] <= 1 and r["loss_after"] < r["loss_before"] for r in attack)
    record, summary = run.read_json("run.json"), run.read_json("summary.json")
    assert record["config"]["tune"]["steps"] == 2 and record["gallery"]["codes"] == 64 and record["finished"]
    assert summary["photos"] == 5 and summary["stage_seconds"]["tune"] > 0
    assert summary["strengthened"] is None and "strengthen" not in summary["stage_seconds"]
    report = run.read("report.html").decode()
    assert "one.png" in report or "zwei Gesichter" in report


def test_second_run_redoes_nothing(archive: Path, first: dict, run: Run) -> None:
    out = archive.parent / "out"
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    again = protect(str(archive), str(out), settings("engine.workers=2", "engine.shard_photos=4"))
    assert all(stage["done"] == 0 for stage in again["engine"]["stages"].values())
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == times
    assert {k: again[k] for k in ("ok", "weak", "error", "psnr", "ism")} == {
        k: first[k] for k in ("ok", "weak", "error", "psnr", "ism")
    }


def test_faces_do_not_depend_on_order_or_grouping(archive: Path, first: dict, run: Run) -> None:
    """The two photos that came last, alone, in one shard, in another OUT: the same bits."""
    names = ["one.png", "deep/er/zwei Gesichter ü.jpg"]
    (archive / "list.txt").write_text("\n".join(names), encoding="utf-8")
    try:
        protect(str(archive / "list.txt"), str(archive.parent / "other"), settings("engine.shard_photos=2"))
    finally:
        (archive / "list.txt").unlink()
    other = Run(str(archive.parent / "other.run"))
    ids = {photo_id(name) for name in names}
    for stage in STAGES:
        clock = ["seconds", "key", "out_path", "tune_seconds", "refine_seconds"]
        one, two = (read_stage(r, stage) for r in (run, other))
        one = one.filter(pa.array([p in ids for p in one["photo_id"].to_pylist()]))
        keep = [c for c in one.column_names if c not in clock]
        assert one.num_rows == 3 and one.select(keep).equals(two.select(keep)), stage
    for name in names:
        assert (archive.parent / "other" / name).read_bytes() == (archive.parent / "out" / name).read_bytes()


def test_changed_and_lost_photos_are_redone_alone(archive: Path, first: dict, run: Run, draw_photo) -> None:
    """One photo changes, another one's published file is lost, a third is broken no more (its face is new)."""
    src, out = archive.parent / "photos2", archive.parent / "out2"
    shutil.copytree(archive, src)  # keeps modification times, but these photos lie elsewhere
    # The same run under another name: parts of the first are reused only for photos that are the same, so none are.
    config = settings("tune.steps=0", "refine.steps=1", "attack.enabled=false", "publish.on_fail=copy")
    protect(str(src), str(out), config)
    Image.fromarray(draw_photo([], width=300)).save(src / "one.png")
    (out / "deep" / "sideways.jpg").unlink()
    result = protect(str(src), str(out), config)
    done = {stage: entry["done"] for stage, entry in result["engine"]["stages"].items()}
    assert done == {"source": 1, "align": 1, "invert": 1, "fuse": 1, "tune": 1, "attack": 1, "publish": 2}
    photos = {row["path"]: row for row in read_photos(str(out) + ".run").to_pylist()}
    assert photos["one.png"]["status"] == "no_face" and (out / "one.png").read_bytes() == (src / "one.png").read_bytes()
    assert (out / "deep" / "sideways.jpg").exists() and photos["deep/sideways.jpg"]["action"] == "protected"
    broken = photos["deep/broken.jpg"]
    assert (
        broken["status"] == "error" and broken["action"] == "copied" and broken["reason"].endswith("copied unprotected")
    )
    assert (out / "deep" / "broken.jpg").read_bytes() == (src / "deep" / "broken.jpg").read_bytes()
    assert json.loads((Path(str(out) + ".run") / "summary.json").read_text())["copied"] == 3
    assert os.path.getsize(str(out) + ".run/report.html") > 1000


def test_closed_loop(archive: Path, draw_photo, tmp_path: Path) -> None:
    """Two photos whose faces stay known go back, with one worker and with two: the same bits, and no round too many."""
    src = tmp_path / "photos"
    src.mkdir()
    shutil.copy(archive / "deep" / "er" / "zwei Gesichter ü.jpg", src / "two.jpg")
    shutil.copy(archive / "one.png", src / "one.png")
    chain = ["tune.steps=0", "refine.steps=1", "refine.id_lock=0.01", "refine.identity=mobilefacenet", "attack.steps=1"]
    chain += ["strengthen.rounds=2", "strengthen.steps=2", "strengthen.looks=2", "publish.max_ism=-1"]
    runs, results = {}, {}
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        results[workers] = protect(str(src), str(out), settings(*chain, f"engine.workers={workers}"))
        runs[workers] = Run(f"{out}.run")
    rows = {n: read_stage(run, "strengthen") for n, run in runs.items()}
    keep = [name for name in rows[1].column_names if name != "seconds"]
    assert rows[1].num_rows == 3 and rows[1].select(keep).equals(rows[2].select(keep))
    for name in ("one.png", "two.jpg"):
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()
    published = {row["face_id"]: row for row in read_stage(runs[1], "publish").to_pylist()}
    for row in rows[1].to_pylist():
        assert row["status"] == "ok" and row["rounds"] == 2 and row["ended"] == "rounds", row["reason"]
        assert row["ism_worst"] < row["ism_worst_before"] and row["kept"] in (1, 2) and row["share"] == 1
        found = published[row["face_id"]]
        assert found["status"] == "weak" and found["ism"] == pytest.approx(row["ism"], abs=1e-4), (
            "it is what was judged"
        )
    counts = {"judged": 3, "less": 0, "share": 1, "faces": 3, "rounds": 6, "ended": {"rounds": 3}}
    assert results[1]["strengthened"] == counts
    assert results[1]["weak_share"] == 1 and results[1]["stage_seconds"]["strengthen"] > 0
    stronger, everything = loop.of_run(runs[1])
    assert stronger["number"] == everything["number"] == 3 and stronger["faces"] == "went back, still known"
    assert stronger["weak"] == 1 and stronger["ism"] == pytest.approx(results[1]["ism"], abs=1e-3)
    assert "faces strengthened" in runs[1].read("report.html").decode()
    again = protect(str(src), str(tmp_path / "out1"), settings(*chain))
    assert all(stage["done"] == 0 for stage in again["engine"]["stages"].values())

    # Another bar: looks and publishing alone are made anew, and a bar that all meet takes less of the change.
    easy = protect(str(src), str(tmp_path / "out1"), settings(*chain, "strengthen.rounds=0", "publish.max_ism=1"))
    done = {name: stage["done"] for name, stage in easy["engine"]["stages"].items()}
    assert done.pop("strengthen") == done.pop("publish") == 2 and not any(done.values())
    assert easy["strengthened"] == {**counts, "less": 3, "share": 0.25, "faces": 0, "rounds": 0, "ended": {"passed": 3}}
    assert easy["jod"] > results[1]["jod"] and easy["weak"] == 0
    assert [line["faces"] for line in loop.of_run(runs[1])] == ["hidden by a share", "all"]


def test_gallery_of_photos_and_its_exclusions(archive: Path, first: dict, run: Run, tmp_path: Path) -> None:
    """A gallery of the archive's own faces, from the codes that the run has made; then a search in it."""
    shutil.copytree(run.url, tmp_path / "gallery.run")
    info, counts = gallery_jobs.build_from_photos(
        str(archive), str(tmp_path / "gallery"), settings(), run_url=str(tmp_path / "gallery.run")
    )
    assert counts == {"photos": 5, "faces": 4, "failed": 1} and (info.count, info.photos, info.broadcast) == (
        4,
        3,
        False,
    )

    gallery = Gallery.load(str(tmp_path / "gallery"))
    faces = read_stage(run, "invert")
    faces = faces.filter(pa.array([status == "ok" for status in faces["status"].to_pylist()]))
    code = np.asarray(faces["code"][0].values).reshape(1, 16, 512)
    assert np.array_equal(gallery.codes(faces["face_id"].to_pylist()[:1]), code)

    # Three codes of other photos are there for a photo of one face, two for the photo of two faces.
    table = faces.append_column("source.person_id", pa.nulls(4, pa.string()))
    rows = fuse.operator(settings(), "w", str(tmp_path / "gallery"))(table).to_pylist()
    two = photo_id("deep/er/zwei Gesichter ü.jpg")
    for row in rows:
        if row["photo_id"] == two:
            assert row["status"] == "error" and row["reason"].startswith("GALLERY: ") and row["failed_stage"] == "fuse"
        else:
            assert row["status"] == "ok" and len(row["most_ids"]) == 3
            assert not any(name.startswith(row["photo_id"]) for name in row["most_ids"])
    assert len(rows) == 4 and sum(row["photo_id"] == two for row in rows) == 2

    # An identity ceiling leaves out whoever looks alike: here the two most alike faces of different photos.
    names, vectors = faces["face_id"].to_pylist(), np.stack([np.asarray(v.values) for v in faces["identity"]])
    alike = np.where([[a[:16] == b[:16] for b in names] for a in names], -2, vectors @ vectors.T)
    ceiling = float(alike.max()) - 1e-4
    capped = settings(f"fuse.identity_ceiling={ceiling}", "fuse.k=1")
    for name, row in zip(names, fuse.operator(capped, "w", str(tmp_path / "gallery"))(table).to_pylist(), strict=True):
        others = {
            other for other, cosine in zip(names, alike[names.index(name)], strict=True) if -2 < cosine <= ceiling
        }
        assert set(row["most_ids"]) <= others
    assert run_gallery.expectation(capped).weights["recogniser"] == info.weights["recogniser"]
    with pytest.raises(GalleryMismatchError, match="identity_ceiling"):
        run_gallery.RunGallery.open(capped, run, print)

    # With a person known, his other photos do not count either; person ids come from folders here.
    people = {p.photo_id: p.person_id for p in list_source(str(archive), people_from="folder").photos}
    assert people[two] == "er" and people[photo_id("one.png")] is None
