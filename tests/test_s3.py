"""Archive, OUT and RUN on S3, over real HTTP, from a server that fails now and then."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from cluster import hash_key
from pipelines.archive import folders, reading
from pipelines.archive.output import check_out, remove_output, write_output
from pipelines.archive.paths import OutputError, SourceError
from pipelines.archive.reading import read_bytes
from pipelines.archive.source import list_photos
from pipelines.config.names import STAGES
from pipelines.run import presence
from pipelines.run.folder import Run, RunError
from pipelines.run.tables import read_photos, read_stage
from tests.helpers.s3_server import Fault

ROOT = Path(__file__).parents[1]
TRANSIENT = ["internal", "slow_down", "bad_gateway", "reset", "cut"]


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr("cluster.retries.time.sleep", lambda seconds: None)


def put(root: str, files: dict[str, bytes]) -> None:
    fs = fsspec.filesystem("s3")
    for name, data in files.items():
        fs.pipe_file(f"{root}/{name}", data)


# ---- listing, reading, writing ---------------------------------------------------------------------------------------


def test_a_listing_comes_page_by_page_in_the_order_of_paths(s3, monkeypatch):
    monkeypatch.setattr(folders, "_PAGE", 4)
    names = ["a/x.jpg", "a-b.jpg", "a.jpg", "a/b/z.PNG", "Z/q.webp", "日本/猫.jpeg", "ваня/é.tif", "a0/c.bmp"]
    names.append("notes.txt")
    put(s3.root, {name: b"12345" for name in names})
    s3.requests.clear()
    rows = list_photos(s3.root)
    first = next(rows)
    assert sum("list-type=2" in target for _, target in s3.requests) <= 2, "the look at SRC itself, and one page"
    assert (first.path, first.size, first.url) == ("Z/q.webp", 5, f"{s3.root}/Z/q.webp") and first.modified
    found = [first, *rows]
    assert [row.path for row in found] == sorted(names)
    assert {row.path: row.code for row in found if row.error} == {"notes.txt": "NOT_A_PHOTO"}
    assert [row.path for row in list_photos(f"{s3.root}/a*/*.jpg")] == ["a/x.jpg"]
    assert [row.path for row in list_photos(f"{s3.root}/**/*.PNG")] == ["a/b/z.PNG"]
    assert read_bytes(first.url) == b"12345"


def test_odd_keys_get_a_reason_and_folders_are_none(s3):
    odd = [".hid/a.jpg", ".hid/b.jpg", "d/.h.jpg", "d/../up.jpg", "d//two.jpg", "e\\f.jpg", "con.jpg", "ok.jpg"]
    put(s3.root, {name: b"x" for name in odd})
    put(s3.root, {"marker/": b""})
    found = {row.path: row.code for row in list_photos(s3.root)}
    assert found == {
        ".hid": "HIDDEN",
        "d/.h.jpg": "HIDDEN",
        "d/../up.jpg": "UNSAFE_PATH",
        "d//two.jpg": "UNSAFE_PATH",
        "e\\f.jpg": "UNSAFE_PATH",
        "con.jpg": "UNSAFE_PATH",
        "ok.jpg": None,
    }
    assert ".hid/a.jpg" in [row.path for row in list_photos(s3.root, hidden=True)]
    for url in (f"{s3.root}/nothing", "s3://no-such-bucket/x"):
        with pytest.raises(SourceError, match="NOT_FOUND"):
            list(list_photos(url))


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_listing_survives_faults_between_pages(s3, monkeypatch, no_pauses, kind):
    monkeypatch.setattr(folders, "_PAGE", 2)
    put(s3.root, {f"{n}.jpg": b"x" for n in range(9)})
    with s3.failing(Fault(kind, "GET", "continuation-token", times=4)) as (fault,):
        assert [row.path for row in list_photos(s3.root)] == [f"{n}.jpg" for n in range(9)]
    assert fault.seen == 4


@pytest.mark.parametrize("kind", [*TRANSIENT, "timeout", "short"])
def test_reading_a_photo_survives_faults_and_notices_what_is_missing(s3, no_pauses, kind):
    data = bytes(range(256)) * 40
    put(s3.root, {"a.jpg": data})
    with s3.failing(Fault(kind, "GET", "a.jpg", times=1 if kind == "timeout" else 3)) as (fault,):
        assert read_bytes(f"{s3.root}/a.jpg") == data
    assert fault.seen
    with s3.failing(Fault(kind, "GET", "a.jpg", times=1)):
        assert reading.content_digest(f"{s3.root}/a.jpg") == hashlib.blake2b(data, digest_size=16).hexdigest()


def test_reading_gives_up_with_a_typed_reason(s3, no_pauses):
    put(s3.root, {"a.jpg": b"x" * 100})
    with s3.failing(Fault("denied", times=None)) as (fault,), pytest.raises(SourceError, match="UNREADABLE"):
        read_bytes(f"{s3.root}/a.jpg")
    assert fault.seen == 1, "a permanent fault is not tried again"
    with s3.failing(Fault("unavailable", times=None)), pytest.raises(SourceError, match="READ_FAILED"):
        read_bytes(f"{s3.root}/a.jpg")
    with pytest.raises(SourceError, match="NOT_FOUND"):
        read_bytes(f"{s3.root}/b.jpg")
    with pytest.raises(SourceError, match="TOO_LARGE"):
        read_bytes(f"{s3.root}/a.jpg", max_bytes=99)


@pytest.mark.parametrize("kind", ["internal", "slow_down", "reset", "lost", "throttled"])
def test_writing_and_removing_an_output_survive_faults(s3, no_pauses, kind):
    with s3.failing(Fault(kind, "PUT", times=2), Fault(kind, "DELETE", times=2)) as faults:
        place = write_output(s3.root, "d/a.jpg", b"data")
        assert place == f"{s3.root}/d/a.jpg" and read_bytes(place) == b"data"
        assert remove_output(s3.root, "d/a.jpg", ["0" * 64]) == "it has changed since it was written"
        assert remove_output(s3.root, "d/a.jpg", [hashlib.sha256(b"data").hexdigest()]) is None
    assert all(fault.seen == 2 for fault in faults)
    with pytest.raises(SourceError, match="NOT_FOUND"):
        read_bytes(place)
    assert remove_output(s3.root, "d/a.jpg", []) is None, "gone before"


def test_out_that_cannot_be_written_is_told_before_a_run_starts(s3, no_pauses):
    put(s3.root, {"in/a.jpg": b"x"})
    check_out(f"{s3.root}/in", f"{s3.root}/out")
    with s3.failing(Fault("denied", "PUT", times=None)), pytest.raises(OutputError, match="NOT_WRITABLE"):
        check_out(f"{s3.root}/in", f"{s3.root}/out")
    with pytest.raises(OutputError, match="OUT_INSIDE_SRC"):
        check_out(f"{s3.root}/in", f"{s3.root}/in/out")


# ---- the run's folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["internal", "slow_down", "reset"])
def test_the_runs_files_survive_faults(s3, no_pauses, kind):
    run = Run(f"{s3.root}/out.run")
    with s3.failing(Fault(kind, times=3)) as (fault,):
        run.write("a.json", b"{}")
    assert fault.seen == 3
    with s3.failing(Fault(kind, times=3)):
        assert run.has("a.json") and not run.has("b.json"), "a fault must not look like a missing file"
    with s3.failing(Fault(kind, times=3)):
        assert run.read_json("a.json") == {} and run.names() == ["a.json"] and run.names("none") == []
    with s3.failing(Fault("denied", times=None)):
        with pytest.raises(PermissionError):
            run.has("a.json")
        with pytest.raises(RunError, match="cannot be read"):
            run.read("a.json")
    run.remove("a.json")
    assert not run.has("a.json")


def test_a_driver_hears_a_request_to_stop_through_s3(s3):
    run = Run(f"{s3.root}/out.run")
    with presence.Presence(run, "protect", every=0.1) as here:
        (entry,) = presence.drivers(run)
        assert entry["id"] == here.id and entry["alive"] and not here.stopped()
        assert [asked["id"] for asked in presence.request_cancel(run)] == [here.id]
        end = time.monotonic() + 20
        while not here.stopped() and time.monotonic() < end:
            time.sleep(0.05)
        assert here.stopped()
    assert presence.drivers(run)[0]["state"] == "finished" and presence.request_cancel(run) == []


# ---- the whole job ---------------------------------------------------------------------------------------------------

SETTINGS = ["tune.steps=2", "refine.steps=2", "attack.steps=2", "gallery.synthetic=64", "fuse.k=3", "engine.workers=1"]
SETTINGS += ["engine.threads=1", "engine.device=cpu"]


def scol(server, *commands: list[str]) -> list[dict]:
    environment = os.environ | server.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "tests" / "helpers" / "s3_drive.py"), json.dumps(commands)]
    done = subprocess.run(script, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def protect(src: str, out: str, *more: str) -> list[str]:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return ["protect", src, "--out", out, "--profile", "quick", "--json", *settings, *more]


def timeless(value):
    """Without what differs from run to run: times, and where OUT is."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not k.endswith("seconds") and k != "out_path"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def rows_of(run: Run) -> dict[str, list]:
    """All rows but what differs between two places and two moments."""
    found = {}
    for stage in STAGES:
        rows = timeless(read_stage(run, stage).drop_columns(["key"]).to_pylist())
        # as text, because NaN does not equal itself; hashed, lest a difference be explained at length
        found[stage] = [
            {name: text if len(text := repr(value)) < 100 else hash_key(text) for name, value in row.items()}
            for row in rows
        ]
    return found


def test_the_whole_job_on_s3_under_faults_ends_as_an_undisturbed_one(s3, draw_photo, tmp_path):
    files = {}
    for name, pixels in {"one.png": draw_photo([100]), "deep/none.png": np.full((160, 240, 3), 90, np.uint8)}.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        files[name] = buffer.getvalue()
    files["deep/broken.png"] = files["one.png"][:2500]
    files["notes.txt"] = b"no photo"
    for name, data in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    put(f"{s3.root}/in", files)
    src, out, run = f"{s3.root}/in", f"{s3.root}/out", Run(f"{s3.root}/out.run")

    kinds = ["internal", "slow_down", "reset", "lost", "throttled", "cut", "short"]
    # A gallery whose file is too short is damaged, and says so: not what is tried here.
    faults = [Fault(kind, avoid="gallery", times=None, share=0.01, seed=n) for n, kind in enumerate(kinds)]
    with s3.failing(*faults):
        first, status, errors, retry, again = scol(
            s3,
            protect(src, out),
            ["status", run.url, "--json"],
            ["errors", run.url, "--no-weak", "--json"],
            ["retry", run.url, "--json"],
            protect(src, out),
        )
    assert first["status"] == 1, first["err"]  # a photo failed
    assert sum(fault.seen for fault in faults) > 5, "there were faults"
    rows, photos = rows_of(run), read_photos(run).to_pylist()
    published = {row["path"]: read_bytes(row["out_path"]) for row in photos if row["out_path"] is not None}

    # An undisturbed one, on a disk. And the next night on S3: a photo has gone, and another is taken out by its path.
    fsspec.filesystem("s3").rm_file(f"{src}/deep/none.png")
    local, night, purge = scol(
        s3,
        protect(str(tmp_path / "in"), str(tmp_path / "out")),
        protect(src, out, "--prune"),
        ["purge", run.url, "--photo", "one.png", "--json"],
    )
    for found in (again, local, night):
        assert found["status"] == 1, found["err"]
    totals = {"photos": 3, "faces": 1, "no_face": 1, "error": 1, "pending": 0, "published": 1, "copied": 1}
    assert {name: json.loads(first["out"])[name] for name in totals} == totals
    assert json.loads(status["out"])["stages"]["publish"]["done"] == 3
    assert [row["path"] for row in json.loads(errors["out"])] == ["deep/broken.png"]
    assert json.loads(retry["out"])["photos"] == {"align": 1}
    engine = json.loads(again["out"])["engine"]["stages"]
    assert {name: engine[name]["done"] for name in ("align", "tune", "publish")} == {
        "align": 1,
        "tune": 1,
        "publish": 1,
    }

    assert rows == rows_of(Run(str(tmp_path / "out.run")))
    assert sorted(published) == ["deep/none.png", "one.png"]
    assert all(data == (tmp_path / "out" / path).read_bytes() for path, data in published.items())

    changes = json.loads(night["out"])["changes"]
    assert (changes["unchanged"], changes["deleted_paths"]) == (2, ["deep/none.png"])
    assert changes["pruned"]["removed_paths"] == ["deep/none.png"]
    purged = json.loads(purge["out"])
    assert purge["status"] == 0 and purged["outputs"] == [f"{out}/one.png"] and purged["codes"] >= 1
    assert fsspec.filesystem("s3").find(out, refresh=True) == []
    assert [row["path"] for row in read_photos(run).to_pylist()] == ["deep/broken.png"]
