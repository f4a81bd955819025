"""Increments: what changed since the last run, `--prune`, `--verify-content`; unchanged photos are not opened."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from pipelines.archive.listing import list_source, packed_ids, source_table
from pipelines.archive.paths import OutputError, photo_id
from pipelines.config.load import load_config
from pipelines.config.names import STAGES
from pipelines.jobs import changes as night_changes
from pipelines.jobs import prune as pruning
from pipelines.jobs.protect import protect
from pipelines.run.folder import Run, RunError
from pipelines.run.schemas import PLAN_SCHEMA
from pipelines.run.tables import read_photos
from pipelines.stages.rows import to_table


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    src = tmp_path / "photos"
    for name in ("a.jpg", "b.jpg", "deep/c.jpg", "deep/er/d.jpg"):
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        (src / name).write_bytes(name.encode())
    return src


def night(run: Run, src: Path, *, name: str = "", **options) -> night_changes.Changes:
    """List, compare, and write the plan, as `protect` does, without running a stage."""
    evidence = "content" if options.get("verify_content") else "stat"
    listing = list_source(str(src), **options)
    source = source_table(listing.photos)
    changes = night_changes.compare(run, name or str(src), listing, listing.all_ids, listing.failed, evidence)
    plan = pa.table([source["photo_id"], source["path"], *[source["key"]] * (1 + len(STAGES))], PLAN_SCHEMA)
    run.write_plan(plan, {"source": name or str(src), "evidence": evidence})
    return changes


def counts(changes: night_changes.Changes) -> tuple:
    return changes.new, changes.changed, changes.unchanged, changes.deleted


def test_new_changed_unchanged_and_deleted(archive: Path, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    first = night(run, archive)
    assert not first.compared and counts(first) == (4, 0, 0, []) and first.words() == ""
    assert counts(night(run, archive)) == (0, 0, 4, [])
    (archive / "b.jpg").write_bytes(b"longer than before")
    (archive / "new.jpg").write_bytes(b"x")
    (archive / "deep/c.jpg").unlink()
    changes = night(run, archive)
    assert counts(changes) == (1, 1, 3 - 1, ["deep/c.jpg"]) and changes.waiting == ["deep/c.jpg"]
    assert changes.words() == "since the last run: 1 new, 1 changed, 2 unchanged, 1 deleted"

    # The night after, it is deleted no more, but still waits for --prune; until it comes back.
    (archive / "a.jpg").unlink()
    changes = night(run, archive)
    assert changes.deleted == ["a.jpg"] and sorted(changes.waiting) == ["a.jpg", "deep/c.jpg"]
    (archive / "deep/c.jpg").write_bytes(b"back")
    changes = night(run, archive)
    assert counts(changes) == (1, 0, 3, []) and changes.waiting == ["a.jpg"]


def test_a_sample_deletes_nothing(archive: Path, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    night(run, archive)
    changes = night(run, archive, limit=1)
    assert counts(changes) == (0, 0, 1, [])
    assert counts(night(run, archive)) == (3, 0, 1, [])


def test_another_source_deletes_nothing(archive: Path, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    night(run, archive)
    (archive / "a.jpg").unlink()
    night(run, archive)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/z.jpg").write_bytes(b"z")
    changes = night(run, tmp_path / "other")
    assert not changes.compared and counts(changes) == (1, 0, 0, []) and changes.waiting == []
    assert night(run, archive).waiting == ["a.jpg"], "kept for its own source"


def test_what_lies_in_a_folder_that_cannot_be_listed_is_not_deleted(archive: Path, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    night(run, archive)
    listing = [row for row in list_source(str(archive)).photos if not row.path.startswith("deep/")]
    (archive / "a.jpg").unlink()
    source = source_table([row for row in listing if row.path != "a.jpg"])
    changes = night_changes.compare(run, str(archive), [source], packed_ids(source["photo_id"]), ["deep"], "stat")
    assert changes.deleted == ["a.jpg"] and changes.unlisted == 2


def test_other_evidence_is_told(archive: Path, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    night(run, archive)
    changes = night(run, archive, verify_content=True)
    assert changes.evidence_changed and changes.changed == 4
    assert not night(run, archive, verify_content=True).evidence_changed


def test_content_decides_where_it_is_verified(archive: Path, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    night(run, archive, verify_content=True)
    file = archive / "a.jpg"
    before = file.stat()
    os.utime(archive / "b.jpg", (1, 1))
    assert counts(night(run, archive, verify_content=True)) == (0, 0, 4, []), "only touched"
    file.write_bytes(b"A.JPG")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert list_source(str(archive)).photos[0].modified == str(before.st_mtime_ns)
    assert counts(night(run, archive, verify_content=True)) == (0, 1, 3, [])
    content = list_source(str(archive), verify_content=True).photos[0].content
    assert content == hashlib.blake2b(b"A.JPG", digest_size=16).hexdigest()


def test_an_unreadable_plan_is_an_error_and_not_a_first_run(archive: Path, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    run.write("plan.parquet", b"PAR1 rubbish")
    with pytest.raises(RunError):
        night(run, archive)


# ---- prune -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pruned(tmp_path: Path):
    """A run that has published some files, all of which SRC has no more; call it to prune."""
    run, out = Run(str(tmp_path / "run")), tmp_path / "out"
    paths = ["alone/gone.jpg", "edited.jpg", "foreign.jpg", "link.jpg", "Case.jpg", "lost.jpg", "failed.jpg"]
    rows = []
    for i, path in enumerate(paths):
        data = f"protected {path}".encode()
        row = {"key": f"{i}", "photo_id": photo_id(path), "status": "ok", "path": path, "action": "protected"}
        row |= {"out_path": str(out / path), "out_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if path == "failed.jpg":
            row |= {"status": "error", "action": "none", "out_path": None, "sha256": None}
        if path != "foreign.jpg":
            rows.append(row)
        if path not in ("lost.jpg", "failed.jpg"):
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            (out / path).write_bytes(data)
    # An earlier version of the first, with other bytes; and one that was written into another OUT.
    rows.append(rows[0] | {"key": "old", "sha256": "0" * 64})
    rows.append(rows[0] | {"key": "other", "path": "foreign.jpg", "photo_id": photo_id("foreign.jpg")})
    rows[-1] |= {"out_path": "/elsewhere/foreign.jpg"}
    run.store.write_part("publish", None, to_table("publish", rows))
    (out / "edited.jpg").write_bytes(b"somebody's work")
    (tmp_path / "precious").write_bytes(b"protected link.jpg")
    (out / "link.jpg").unlink()
    (out / "link.jpg").symlink_to(tmp_path / "precious")
    os.link(out / "Case.jpg", out / "case.jpg")  # as on a file system that takes one for the other
    table = [{"photo_id": photo_id(path), "path": path, "source": "/src"} for path in paths]
    run.write_table(night_changes.DELETED, pa.Table.from_pylist(table, night_changes.DELETED_SCHEMA))
    return lambda src="/src": pruning.prune(run, src, str(out), [pa.array(["case.jpg"]), pa.array(["live.jpg"])])


def test_prune_removes_only_what_scol_wrote_and_nobody_changed(pruned, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pruned("/another").removed == [] and (out / "alone/gone.jpg").exists()
    done = pruned()
    assert not (out / "alone").exists(), "the folder is empty now"
    assert (out / "edited.jpg").read_bytes() == b"somebody's work"
    assert (out / "foreign.jpg").exists(), "the manifest says nothing of it"
    assert (out / "link.jpg").is_symlink() and (tmp_path / "precious").exists()
    assert (out / "case.jpg").exists() and (out / "Case.jpg").exists()
    assert sorted(done.removed) == ["alone/gone.jpg", "failed.jpg", "foreign.jpg", "lost.jpg"]
    assert {path: why.split()[0] for path, why in done.kept.items()} == {
        "edited.jpg": "it",
        "link.jpg": "something",
        "Case.jpg": "a",
    }
    again = pruned()
    assert again.removed == [] and again.kept == done.kept, "what stays is reported until somebody decides"


def test_prune_does_not_follow_a_link_out_of_out(pruned, tmp_path: Path) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    (out / "alone").rename(outside)
    (out / "alone").symlink_to(outside)
    with pytest.raises(OutputError, match="UNSAFE_PATH"):
        pruned()
    assert (outside / "gone.jpg").exists()


# ---- the whole job ---------------------------------------------------------------------------------------------------


@contextmanager
def opened(folder: Path) -> Iterator[Counter]:
    """Counts how often each file of a folder is opened by any process (inotify(7)); filled at the block's end."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(os.O_NONBLOCK)
    assert handle >= 0 and libc.inotify_add_watch(handle, os.fsencode(folder), 0x20) >= 0  # IN_OPEN
    count: Counter = Counter()
    try:
        yield count
        while True:
            try:
                data = os.read(handle, 65536)
            except BlockingIOError:
                break
            while data:
                _, _, _, length = struct.unpack_from("iIII", data)
                name = data[16 : 16 + length].rstrip(b"\0").decode()
                if name:
                    count[name] += 1
                data = data[16 + length :]
    finally:
        os.close(handle)


@pytest.mark.skipif(sys.platform != "linux", reason="inotify")
def test_unchanged_photos_are_listed_and_not_read(ray_cluster, tmp_path: Path) -> None:
    src, out = tmp_path / "photos", tmp_path / "out"
    src.mkdir()
    for i in range(4):  # no faces: they are copied
        Image.new("RGB", (120, 90), (50 * i, 120, 60)).save(src / f"{i}.png")
    sets = ["gallery.synthetic=50", "fuse.k=3", "engine.workers=1", "engine.threads=1", "engine.device=cpu"]
    config = load_config("quick", sets=sets)
    with opened(src) as reads:
        protect(str(src), str(out), config, log_json=str(tmp_path / "log.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [lines[0]["event"], lines[-1]["event"], lines[-1]["state"]] == ["start", "end", "finished"]
    shards = [line for line in lines if line["event"] == "shard" and line["stage"] == "publish"]
    logged = [photo for shard in shards for photo in shard["photos"]]
    assert sorted(logged) == sorted(photo_id(f"{i}.png") for i in range(4))
    assert set(reads) == {"0.png", "1.png", "2.png", "3.png"} and min(reads.values()) >= 1

    said: list[str] = []
    with opened(src) as reads:
        result = protect(str(src), str(out), config, say=said.append)
    assert not reads, "an unchanged photo is not opened"
    assert "since the last run: 0 new, 0 changed, 4 unchanged, 0 deleted" in said
    changes = result["changes"]
    assert (changes["new"], changes["changed"], changes["unchanged"], changes["deleted"]) == (0, 0, 4, 0)

    Image.new("RGB", (140, 90)).save(src / "1.png")
    Image.new("RGB", (100, 90)).save(src / "new.png")
    (src / "2.png").unlink()
    with opened(src) as reads:
        result = protect(str(src), str(out), config)
    assert set(reads) == {"1.png", "new.png"}
    assert result["changes"]["deleted_paths"] == ["2.png"] and (out / "2.png").exists()
    with opened(src) as reads:
        result = protect(str(src), str(out), config, prune=True, say=said.append)
    assert not reads and not (out / "2.png").exists() and said[-1] == "pruned: 1 output(s) removed"
    assert result["changes"]["pruned"] == {"removed": 1, "removed_paths": ["2.png"], "kept": {}}
    assert sorted(p.name for p in out.iterdir()) == ["0.png", "1.png", "3.png", "new.png"]
    assert read_photos(str(out) + ".run")["status"].to_pylist() == ["no_face"] * 4
