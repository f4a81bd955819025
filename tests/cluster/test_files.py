"""`cluster.files`: a file is there whole or not at all."""

import errno
import hashlib
import os
import pickle
import sys
import threading

import pytest

from cluster import BadUrlError, StoreError, UnsafeStoreError
from cluster.files import Files, replacing
from pipelines.jobs.purge import _TEMP
from tests.helpers.s3_server import Fault


@pytest.fixture(params=["local", "memory", "s3"])
def files(request, tmp_path):
    if request.param == "s3":
        return Files(f"{request.getfixturevalue('s3').root}/f")
    return Files(tmp_path / "f" if request.param == "local" else f"memory://{tmp_path}/f")


@pytest.fixture
def pauses(monkeypatch):
    found = []
    monkeypatch.setattr("cluster.retries.time.sleep", found.append)
    return found


def test_every_back_end_does_the_same(files):
    data = os.urandom(300_000)
    assert not files.has("d/a") and files.list() == files.list("d") == []
    with pytest.raises(FileNotFoundError):
        files.read("d/a")
    files.remove("d/a")
    files.write("d/a", b"old")
    files.write("d/a", lambda file: file.write(data))
    assert files.create("d/b", b"first") and not files.create("d/b", b"second")
    assert files.create("d/c", lambda file: file.write(data)) and not files.create("d/c", lambda file: file.write(b"x"))
    again = pickle.loads(pickle.dumps(files))
    assert again.read("d/a") == again.read("d/c") == data and again.read("d/b") == b"first"
    assert again.digest("d/a") == (len(data), hashlib.sha256(data).hexdigest())
    assert again.list() == [("d", True)] and again.list("d") == [("a", False), ("b", False), ("c", False)]
    assert again.has("d/a") and not again.has("d") and again.info("d/a")["size"] == len(data)
    assert Files(f"{files.url}/d/b").read() == b"first"
    with again.open("d/b") as file:
        assert file.read(3) == b"fir"
    with pytest.raises(OSError, match="the limit is 4") as caught:
        files.read("d/b", max_bytes=4)
    assert caught.value.errno == errno.EFBIG and files.read("d/b", max_bytes=5) == b"first"
    files.remove("d/a")
    assert not files.has("d/a") and not again.has("d/a")


def test_of_many_that_create_at_once_one_has_made_the_file(files):
    barrier, won = threading.Barrier(3), []

    def race(number):
        mine = Files(files.url)
        for turn in range(6):
            words = f"{turn} by {number}".encode()
            barrier.wait(60)
            # every other time by a function, with all of them at work before the first is done
            if mine.create(f"{turn}", words if turn % 2 else lambda file, w=words: (barrier.wait(60), file.write(w))):
                won.append((turn, words))

    threads = [threading.Thread(target=race, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [(turn, files.read(f"{turn}")) for turn in range(6)]
    assert [name for name, _ in files.list()] == [f"{turn}" for turn in range(6)]


@pytest.mark.parametrize("kind", ["internal", "slow_down", "reset", "lost", "conflict"])
def test_faults_of_a_store_are_survived(s3, pauses, kind):
    files, data = Files(f"{s3.root}/f"), os.urandom(5000)
    with s3.failing(Fault(kind, "PUT", times=2), Fault(kind, "DELETE", times=2)) as faults:
        assert files.create("a", data)
        assert files.create("b", lambda file: file.write(data))
        files.write("c", lambda file: file.write(data))
        assert not files.create("a", b"other")
        files.remove("c")
    assert faults[0].seen == faults[1].seen == 2
    assert files.read("a") == files.read("b") == data and [name for name, _ in files.list()] == ["a", "b"]


@pytest.mark.parametrize("kind", ["internal", "reset", "cut", "short"])
def test_what_comes_incompletely_is_asked_for_again(s3, pauses, kind):
    files, data = Files(f"{s3.root}/f"), os.urandom(5000)
    files.write("a", data)
    with s3.failing(Fault(kind, "GET", times=3)):
        assert files.read("a") == data
    with s3.failing(Fault(kind, "GET", times=1)):
        assert files.digest("a") == (5000, hashlib.sha256(data).hexdigest())


def test_what_an_old_listing_says_of_a_size_does_not_count(s3):
    files = Files(f"{s3.root}/f")
    files.write("a", b"short")
    assert files.list() == [("a", False)]
    other = type(files.fs)(skip_instance_cache=True)
    other.pipe_file(files.path("a"), b"rather longer")
    assert files.read("a") == b"rather longer" and files.digest("a")[0] == 13


def test_a_file_system_that_promises_nothing_is_refused_for_creating_alone(tmp_path):
    options = {"dir": {"path": str(tmp_path)}}
    files = Files(f"dir::file://{tmp_path}", options)
    files.write("a", b"x")
    assert files.read("a") == b"x"
    with pytest.raises(UnsafeStoreError):
        files.create("b", b"x")
    allowed = Files(f"dir::file://{tmp_path}", options, allow_unsafe=True)
    assert allowed.create("b", b"x") and not allowed.create("b", b"y") and files.read("b") == b"x"


def test_a_local_path_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("a::b", "c:d", str(tmp_path / "e::file://f")):
        files = Files(path)
        files.write("x", b"x")
        assert files.local and open(os.path.join(path, "x"), "rb").read() == b"x" and os.path.isabs(files.url)


@pytest.mark.parametrize(
    ("url", "words"),
    [("nosuch://x", "nosuch"), ("nosuch::file:///x", "nosuch"), ("gs://bucket/x", "package gcsfs is not installed")],
)
def test_a_url_that_cannot_be_opened(url, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(BadUrlError, match=words) as caught:
        Files(url)
    assert isinstance(caught.value, StoreError) and url in str(caught.value) and "\n" not in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).path == url


def test_the_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        assert os.path.dirname(temporary) == str(tmp_path) and _TEMP.fullmatch(os.path.basename(temporary))
        with open(temporary, "w") as file:
            file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("written", [True, False])
def test_an_error_leaves_what_was_there(tmp_path, written):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        if written:
            with open(temporary, "w") as file:
                file.write("half")
        1 / 0
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "none" / "a.txt") as temporary:
        open(temporary, "w")
