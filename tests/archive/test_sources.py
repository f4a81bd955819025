"""Listing, reading and writing: every odd entry gets a row or a typed error, and nothing leaves OUT."""

import errno
import hashlib
import os
import socket
from contextlib import suppress

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.archive import output
from pipelines.archive.output import check_out, write_output
from pipelines.archive.paths import OutputError, SourceError, photo_id, safe_relative
from pipelines.archive.reading import read_bytes
from pipelines.archive.source import list_photos


def touch(path, data=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def paths(src, **kw):
    return [row.path for row in list_photos(str(src), **kw)]


def codes(src, **kw):
    return {row.path: row.code for row in list_photos(str(src), **kw)}


def test_folder_all_depths_sorted_as_text(tmp_path):
    names = [
        "a/x.jpg",
        "a-b.jpg",
        "a.jpg",
        "a/b/z.PNG",
        "Z/q.webp",
        "日本/猫.jpeg",
        "ваня/é.tif",
        "b 1/👩‍🚀.jpg",
        "a0/c.bmp",
    ]
    for name in names:
        touch(tmp_path / name, b"12345")
    rows = list(list_photos(str(tmp_path)))
    assert [row.path for row in rows] == sorted(names)
    row = rows[0]
    st = os.stat(tmp_path / row.path)
    assert (row.size, row.modified, row.error) == (5, str(st.st_mtime_ns), None)
    assert read_bytes(row.url) == b"12345"
    assert row.photo_id == photo_id(row.path) == hashlib.blake2b(row.path.encode()).hexdigest()[:16]
    assert paths(f"file://{tmp_path}") == sorted(names)


def test_other_files_are_reported_as_skipped(tmp_path):
    for name in ("a.jpg", "notes.txt", "b.heic", "c.nef", ".hidden.jpg", ".thumbs/d.jpg", "noend"):
        touch(tmp_path / name)
    rows = {row.path: row for row in list_photos(str(tmp_path))}
    assert {p: r.code for p, r in rows.items()} == {
        "a.jpg": None,
        "notes.txt": "NOT_A_PHOTO",
        "b.heic": None,
        "c.nef": None,
        ".hidden.jpg": "HIDDEN",
        ".thumbs": "HIDDEN",
        "noend": "NOT_A_PHOTO",
    }
    assert [p for p, r in rows.items() if r.skipped] == [".hidden.jpg", ".thumbs", "noend", "notes.txt"]
    shown = codes(tmp_path, hidden=True)
    assert shown[".hidden.jpg"] is None and shown[".thumbs/d.jpg"] is None


def test_people_from_folder(tmp_path):
    for name in ("top.jpg", "ann/1.jpg", "x/bob/2.jpg"):
        touch(tmp_path / name)
    people = {row.path: row.person_id for row in list_photos(str(tmp_path), people_from="folder")}
    assert people == {"top.jpg": None, "ann/1.jpg": "ann", "x/bob/2.jpg": "bob"}
    assert {row.person_id for row in list_photos(str(tmp_path))} == {None}
    with pytest.raises(ValueError, match="people_from"):
        list(list_photos(str(tmp_path), people_from="mood"))


def test_links_loops_and_ways_out(tmp_path):
    src, outside = tmp_path / "src", tmp_path / "outside"
    touch(src / "d/a.jpg")
    touch(outside / "secret.jpg")
    (src / "d/loop").symlink_to(src)
    (src / "d/self.jpg").symlink_to(src / "d/self.jpg")
    (src / "gone.jpg").symlink_to(src / "nothing.jpg")
    (src / "out").symlink_to(outside)
    (src / "out.jpg").symlink_to(outside / "secret.jpg")
    (src / "link.jpg").symlink_to(src / "d/a.jpg")
    (src / "linked").symlink_to(src / "d")
    got = codes(src)
    assert got == {
        "d/a.jpg": None,
        "d/loop": "LINK_LOOP",
        "d/self.jpg": "LINK_LOOP",
        "gone.jpg": "BROKEN_LINK",
        "out": "LINK_OUTSIDE",
        "out.jpg": "LINK_OUTSIDE",
        "link.jpg": None,
        "linked/a.jpg": None,
        "linked/loop": "LINK_LOOP",
        "linked/self.jpg": "LINK_LOOP",
    }


def test_mutual_links_end(tmp_path):
    for i in range(5):
        touch(tmp_path / f"{i}/p.jpg")
        for j in range(5):
            if i != j:
                (tmp_path / f"{i}/to{j}").symlink_to(tmp_path / f"{j}")
    got = codes(tmp_path)
    assert all(got[f"{i}/p.jpg"] is None for i in range(5))
    assert "LINK_LOOP" in got.values() and len(got) < 2000


def test_deep_trees_do_not_hit_the_recursion_limit(tmp_path):
    depth, handles = 1200, [os.open(tmp_path, os.O_RDONLY)]
    try:
        for _ in range(depth):
            os.mkdir("d", dir_fd=handles[-1])
            handles.append(os.open("d", os.O_RDONLY, dir_fd=handles[-1]))
            os.close(handles[-2])
        os.close(os.open("x.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=handles[-1]))
        assert paths(tmp_path) == ["d/" * depth + "x.jpg"]
    finally:
        # By hand: pytest's own cleaning up (shutil.rmtree) recurses.
        here = handles[-1]
        with suppress(FileNotFoundError):
            os.unlink("x.jpg", dir_fd=here)
        for _ in range(len(handles) - 1):
            above = os.open("..", os.O_RDONLY, dir_fd=here)
            os.close(here)
            os.rmdir("d", dir_fd=above)
            here = above
        os.close(here)


def test_names_that_are_not_utf8_or_not_safe(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg"), "wb"):
        pass
    touch(tmp_path / "new\nline.jpg")
    touch(tmp_path / "back\\slash.jpg")
    got = codes(tmp_path)
    assert got == {"caf\\xe9.jpg": "NAME_NOT_UTF8", "new\nline.jpg": "UNSAFE_PATH", "back\\slash.jpg": "UNSAFE_PATH"}
    for path in got:
        path.encode("utf-8")


def test_special_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "s.jpg"))
        assert codes(tmp_path) == {"pipe.jpg": "NOT_A_FILE", "s.jpg": "NOT_A_FILE"}
    with pytest.raises(SourceError, match="NOT_A_FILE"):
        read_bytes(str(tmp_path / "pipe.jpg"))


def test_unreadable(tmp_path, monkeypatch):
    """Permissions do not hold for root, whom CI runs as: the system's answer is put in its place."""
    touch(tmp_path / "locked/a.jpg")
    touch(tmp_path / "b.jpg")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert codes(tmp_path) == {"b.jpg": None, "locked": "UNREADABLE"}

    def locked(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", locked)
    with pytest.raises(SourceError, match="UNREADABLE"):
        read_bytes(str(tmp_path / "b.jpg"))


def test_read_bytes_limits(tmp_path):
    touch(tmp_path / "a.jpg", b"1234")
    with pytest.raises(SourceError, match="TOO_LARGE"):
        read_bytes(str(tmp_path / "a.jpg"), max_bytes=3)
    with pytest.raises(SourceError, match="NOT_FOUND"):
        read_bytes(str(tmp_path / "b.jpg"))
    with pytest.raises(SourceError, match="NOT_A_FILE"):
        read_bytes(str(tmp_path))
    with pytest.raises(SourceError, match="BAD_URL"):
        read_bytes("nosuchstore://a/b.jpg")


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*.jpg", ["a.jpg", "b.jpg"]),
        ("**/*.jpg", ["a.jpg", "b.jpg", "d/c.jpg", "d/e/f.jpg"]),
        ("[ab].jpg", ["a.jpg", "b.jpg"]),
        ("d/?.jpg", ["c.jpg"]),
        ("*/e/*", ["d/e/f.jpg", "d/e/g.txt"]),
        ("*.tif", []),
    ],
)
def test_globs(tmp_path, pattern, wanted):
    for name in ("a.jpg", "b.jpg", "n.txt", "d/c.jpg", "d/e/f.jpg", "d/e/g.txt"):
        touch(tmp_path / name)
    assert paths(f"{tmp_path}/{pattern}") == wanted


def test_a_folder_whose_name_looks_like_a_glob(tmp_path):
    touch(tmp_path / "a[1]/x.jpg")
    assert paths(tmp_path / "a[1]") == ["x.jpg"]


def test_one_photo(tmp_path):
    touch(tmp_path / "a.jpg", b"abc")
    (row,) = list_photos(str(tmp_path / "a.jpg"))
    assert (row.path, row.size, row.url) == ("a.jpg", 3, str(tmp_path / "a.jpg"))


def test_text_list(tmp_path):
    touch(tmp_path / "in/a.jpg")
    touch(tmp_path / "in/b")
    elsewhere = touch(tmp_path / "far/c.jpg")
    text = f"\ufeffb\r\n\n{tmp_path}/in/a.jpg\r\n{elsewhere}\nmissing.jpg\n../far/c.jpg\nC:\\x.jpg\n"
    touch(tmp_path / "in/list.txt", text.encode() + b"caf\xe9.jpg\n")
    rows = {row.path: row for row in list_photos(str(tmp_path / "in/list.txt"))}
    outside = str(elsewhere).lstrip("/")
    assert {p: r.code for p, r in rows.items()} == {
        "b": None,
        "a.jpg": None,
        outside: None,
        "missing.jpg": "NOT_FOUND",
        "../far/c.jpg": "UNSAFE_PATH",
        "C:\\x.jpg": "UNSAFE_PATH",
        "caf\\xe9.jpg": "NAME_NOT_UTF8",
    }
    assert list(rows) == sorted(rows, key=lambda p: rows[p].path)
    assert rows[outside].url == str(elsewhere)


def test_a_list_that_names_a_path_twice(tmp_path):
    touch(tmp_path / "a.jpg")
    touch(tmp_path / "list.txt", b"a.jpg\n./a.jpg\n")
    with pytest.raises(SourceError, match=r"DUPLICATE.*a\.jpg"):
        list(list_photos(str(tmp_path / "list.txt")))


def test_tables(tmp_path):
    for name in ("a.jpg", "b.jpg", "007.jpg"):
        touch(tmp_path / name)
    pq.write_table(
        pa.table({"path": ["b.jpg", "a.jpg", None], "person_id": [7, None, 1], "x": [1, 2, 3]}), tmp_path / "t.parquet"
    )
    rows = list(list_photos(str(tmp_path / "t.parquet")))
    assert [(r.path, r.person_id, r.code) for r in rows] == [
        ("(row 3)", None, "EMPTY_PATH"),
        ("a.jpg", None, None),
        ("b.jpg", "7", None),
    ]
    touch(tmp_path / "t.csv", b"person_id,path\n007,007.jpg\n,a.jpg\n")
    assert [(r.path, r.person_id) for r in list_photos(str(tmp_path / "t.csv"))] == [
        ("007.jpg", "007"),
        ("a.jpg", None),
    ]
    touch(tmp_path / "bad.csv", b"file\na.jpg\n")
    touch(tmp_path / "bad.parquet", b"PAR1 this is none PAR1")
    for name in ("bad.csv", "bad.parquet"):
        with pytest.raises(SourceError, match="BAD_LIST"):
            list(list_photos(str(tmp_path / name)))


def test_missing_source(tmp_path):
    with pytest.raises(SourceError, match="NOT_FOUND"):
        list(list_photos(str(tmp_path / "none")))
    with pytest.raises(SourceError, match="BAD_URL"):
        list(list_photos("nosuchstore://bucket/x"))


@pytest.fixture
def store():
    fs = fsspec.filesystem("memory")
    name = f"scol-{os.urandom(6).hex()}"
    yield f"memory://{name}"
    if fs.exists(f"/{name}"):
        fs.rm(f"/{name}", recursive=True)


def test_a_store(store):
    fs = fsspec.filesystem("memory")
    for name in ("a/x.jpg", "a-b.jpg", "a.jpg", "n.txt", ".h.jpg", "ж/ü.png"):
        fs.pipe_file(f"{store}/src/{name}", b"data")
    rows = {row.path: row for row in list_photos(f"{store}/src")}
    assert list(rows) == sorted(rows)
    assert {p: r.code for p, r in rows.items()} == {
        ".h.jpg": "HIDDEN",
        "a/x.jpg": None,
        "a-b.jpg": None,
        "a.jpg": None,
        "n.txt": "NOT_A_PHOTO",
        "ж/ü.png": None,
    }
    row = rows["ж/ü.png"]
    assert row.size == 4 and row.modified and read_bytes(row.url) == b"data"
    assert paths(f"{store}/src/**/x*") == ["a/x.jpg"]
    with pytest.raises(SourceError, match="NOT_FOUND"):
        read_bytes(f"{store}/src/none.jpg")

    fs.pipe_file(f"{store}/src/list.txt", f"a.jpg\n{store}/src/a/x.jpg\nmissing.jpg\n".encode())
    assert codes(f"{store}/src/list.txt") == {"a.jpg": None, "a/x.jpg": None, "missing.jpg": "NOT_FOUND"}

    where = write_output(f"{store}/out", "ж/ü.png", b"new")
    assert read_bytes(where) == b"new"
    check_out(f"{store}/src", f"{store}/out")
    assert [os.path.basename(p) for p in fs.find(f"{store}/out")] == ["ü.png"]
    with pytest.raises(OutputError, match="OUT_INSIDE_SRC"):
        check_out(f"{store}/src", f"{store}/src/out")
    with pytest.raises(OutputError, match="OUT_IS_SRC"):
        check_out(f"{store}/src", f"{store}/src/")


@pytest.mark.parametrize(
    "path",
    ["a.jpg", "a/b.jpg", "日本/猫.jpg", "a b/c (1).jpg", "..a.jpg", "a..jpg", "console.jpg", "2020-01-01 10:20.jpg"],
)
def test_safe_paths(path):
    assert safe_relative(path) == path


def test_normal_form():
    assert safe_relative("./a//b/./c.jpg") == "a/b/c.jpg"


@pytest.mark.parametrize(
    "path",
    [
        "../a.jpg",
        "a/../../b.jpg",
        "a/..",
        "/etc/passwd",
        "C:a.jpg",
        "c:/a.jpg",
        "a\\b.jpg",
        "\\\\host\\a",
        "a\0.jpg",
        "a\n.jpg",
        "a\x7f.jpg",
        "a\u2028.jpg",
        "\ud800.jpg",
        "con",
        "a/NUL.jpg",
        "Com1.png",
        "aux .jpg",
        "...",
        "a/. ./b.jpg",
    ],
)
def test_unsafe_paths(path):
    with pytest.raises(SourceError) as e:
        safe_relative(path)
    assert e.value.code == "UNSAFE_PATH"


@pytest.mark.parametrize("path", ["", ".", "./", "//"[:0]])
def test_empty_paths(path):
    with pytest.raises(SourceError, match="EMPTY_PATH"):
        safe_relative(path)


def test_out_against_src(tmp_path):
    src = tmp_path / "src"
    touch(src / "a.jpg")
    (tmp_path / "alias").symlink_to(src)
    for out, code in (
        (src, "OUT_IS_SRC"),
        (src / "sub/deep", "OUT_INSIDE_SRC"),
        (tmp_path / "alias/o", "OUT_INSIDE_SRC"),
        (tmp_path, "SRC_INSIDE_OUT"),
        (src / ".." / "src", "OUT_IS_SRC"),
    ):
        with pytest.raises(OutputError) as e:
            check_out(str(src), str(out))
        assert e.value.code == code, out
    assert not (src / "sub").exists()
    with pytest.raises(OutputError, match="OUT_INSIDE_SRC"):
        check_out(f"{src}/*.jpg", str(src / "out"))
    touch(tmp_path / "file")
    with pytest.raises(OutputError, match="OUT_NOT_A_FOLDER"):
        check_out(str(src), str(tmp_path / "file"))
    check_out(str(src), str(tmp_path / "srcX/new"))
    assert list((tmp_path / "srcX/new").iterdir()) == []


def test_out_that_cannot_be_written(tmp_path):
    touch(tmp_path / "src/a.jpg")
    touch(tmp_path / "file")
    with pytest.raises(OutputError, match="WRITE_FAILED"):
        check_out(str(tmp_path / "src"), str(tmp_path / "file/out"))
    with pytest.raises(OutputError) as e:
        check_out(str(tmp_path / "src"), "/proc/scol-out")
    assert e.value.code in ("NOT_WRITABLE", "WRITE_FAILED")


def test_a_list_cannot_make_out_overwrite_its_sources(tmp_path):
    touch(tmp_path / "out/a.jpg")
    touch(tmp_path / "b.jpg")
    touch(tmp_path / "list.txt", b"out/a.jpg\nb.jpg\n")
    check_out(str(tmp_path / "list.txt"), str(tmp_path / "out"))
    assert codes(tmp_path / "list.txt", out=str(tmp_path / "out")) == {"out/a.jpg": "IN_OUT", "b.jpg": None}


def test_write_output_replaces_whole_files(tmp_path):
    where = write_output(str(tmp_path / "out"), "d/日本.jpg", b"one")
    assert where == str(tmp_path / "out/d/日本.jpg")
    write_output(str(tmp_path / "out"), "d/日本.jpg", b"two")
    assert (tmp_path / "out/d/日本.jpg").read_bytes() == b"two"
    assert os.listdir(tmp_path / "out/d") == ["日本.jpg"]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "DISK_FULL"),
        (errno.EDQUOT, "DISK_FULL"),
        (errno.EROFS, "NOT_WRITABLE"),
        (errno.EACCES, "NOT_WRITABLE"),
        (errno.EIO, "WRITE_FAILED"),
    ],
)
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, number, code):
    write_output(str(tmp_path), "a.jpg", b"old")

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(output.os, "fsync", fail)
    monkeypatch.setattr("cluster.retries.time.sleep", lambda seconds: None)
    with pytest.raises(OutputError) as e:
        write_output(str(tmp_path), "a.jpg", b"new and longer")
    assert e.value.code == code
    assert os.listdir(tmp_path) == ["a.jpg"] and (tmp_path / "a.jpg").read_bytes() == b"old"


def test_a_real_full_disk():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError) as e, open("/dev/full", "wb") as f:
        f.write(b"x")
    assert output._out_error(e.value, "a.jpg").code == "DISK_FULL"


def test_output_cannot_leave_out(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (out / "link").symlink_to(tmp_path / "elsewhere")
    for path in ("../a.jpg", "/tmp/a.jpg", "link/a.jpg", "link/new/a.jpg"):
        with pytest.raises(OutputError, match="UNSAFE_PATH"):
            write_output(str(out), path, b"x")
    assert os.listdir(tmp_path / "elsewhere") == []
    # A link in the place of the file itself is replaced, not followed.
    victim = touch(tmp_path / "victim.jpg", b"mine")
    (out / "a.jpg").symlink_to(victim)
    write_output(str(out), "a.jpg", b"x")
    assert victim.read_bytes() == b"mine" and not (out / "a.jpg").is_symlink()


def test_a_folder_where_a_file_must_go(tmp_path):
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(OutputError, match="WRITE_FAILED"):
        write_output(str(tmp_path), "a.jpg", b"x")
    touch(tmp_path / "b")
    with pytest.raises(OutputError, match="WRITE_FAILED"):
        write_output(str(tmp_path), "b/c.jpg", b"x")
    assert sorted(os.listdir(tmp_path)) == ["a.jpg", "b"]
