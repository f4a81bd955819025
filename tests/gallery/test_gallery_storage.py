"""The files of a gallery on S3, over real HTTP: of two builders one has made a file, and faults that may pass do."""

from __future__ import annotations

import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gallery_index.errors import GalleryCorruptError, GalleryError
from gallery_index.storage import Folder
from gallery_index.table import read_columns
from tests.helpers.s3_server import Fault


@pytest.fixture
def folder(s3, monkeypatch):
    monkeypatch.setattr("cluster.retries.time.sleep", lambda seconds: None)
    return Folder(f"{s3.root}/g")


def test_of_two_builders_at_once_one_has_made_the_file(s3, folder):
    barrier, found = threading.Barrier(2), []

    def build(number):
        mine = Folder(folder.url)

        def write(file):
            barrier.wait(60)  # both have looked, and none was there
            file.write(f"by {number}".encode())

        entry, made = mine.once("codes", write)
        found.append((made, mine.read(entry)))

    builders = [threading.Thread(target=build, args=(number,)) for number in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    content = folder.fetch("codes")
    assert sorted(found) == [(False, content), (True, content)], "the loser has the winner's file, and knows it"
    assert folder.names() == ["codes"], "no temporary file is left"


@pytest.mark.parametrize("kind", ["internal", "slow_down", "reset", "lost"])
def test_writing_survives_faults(s3, folder, kind):
    with s3.failing(Fault(kind, "PUT", times=6)) as (fault,):
        assert folder.create("index.json", b"{}") is True, "also where only the answer was lost"
    with s3.failing(Fault(kind, "PUT", times=6)) as (other,):
        entry, made = folder.once("codes", lambda file: file.write(b"x" * 1000))
    assert made and fault.seen and other.seen and folder.read(entry) == b"x" * 1000
    with s3.failing(Fault(kind, "PUT", times=6)):
        folder.replace("CURRENT", b"new")
    with s3.failing(Fault(kind, "DELETE", times=2)):
        folder.remove("codes")
    assert folder.fetch("CURRENT") == b"new" and folder.names() == ["CURRENT", "index.json"]
    folder.remove_all()
    assert folder.names() == []


@pytest.mark.parametrize("kind", ["internal", "slow_down", "reset", "cut", "short"])
def test_reading_survives_faults(s3, folder, kind):
    entry, _ = folder.once("codes", lambda file: pq.write_table(pa.table({"id": ["a" * 1000] * 9}), file))
    with s3.failing(Fault(kind, "GET", "codes", times=3)) as (fault,):
        assert len(folder.read(entry)) == entry.size
    assert fault.seen == 3
    if kind != "short":  # its end is where a part of it is asked for
        with s3.failing(Fault(kind, "GET", "codes", times=3)):
            assert read_columns(folder, "codes", ["id"]).num_rows == 9
    with s3.failing(Fault(kind, "GET", "list-type=2", times=1 if kind == "short" else 3)):
        assert folder.exists("codes") and not folder.exists("other")
    with pytest.raises(GalleryCorruptError, match="no column photo_id"):
        read_columns(folder, "codes", ["id", "photo_id"])


def test_a_store_that_does_not_answer_does_not_look_like_an_empty_one(s3, folder):
    folder.create("index.json", b"{}")
    with s3.failing(Fault("denied", times=None)), pytest.raises(PermissionError):
        folder.exists("index.json")


def test_a_store_that_promises_nothing_is_refused_when_a_file_is_to_be_made(tmp_path):
    folder = Folder(f"dir::file://{tmp_path}", {"dir": {"path": str(tmp_path)}})
    with pytest.raises(GalleryError, match="create-if-absent"):
        folder.create("index.json", b"{}")
    with pytest.raises(GalleryError, match="nosuch"):
        Folder("nosuch://x")
