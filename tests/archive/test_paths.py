"""Paths from lists, tables and manifests cannot leave OUT: seeded attempts, judged by other rules than the code's."""

from __future__ import annotations

import hashlib
import ntpath
import os
import posixpath
import random
import re
import unicodedata
from pathlib import Path, PureWindowsPath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.archive.output import remove_output, write_output
from pipelines.archive.paths import OutputError, SourceError, safe_relative
from pipelines.archive.source import list_photos

# Dots, separators, drives, devices, links; plain, and as other characters that some system takes for them.
PIECES = [
    *("..", ".", "...", ". .", ".. ", " ..", "", " ", "~", "a", "b.jpg", "a.", "-rf", "$(x)", "%2e%2e", "%2f"),
    *("\\", "..\\..", "a\\b", "C:", "c:x.jpg", "C:\\x", "\\\\host\\share", "x:y", "9:30.jpg", "a.jpg:stream"),
    *("CON", "con.jpg", "Aux .png", "nul.tar.gz", "COM1", "com¹.jpg", "LPT³", "CONIN$", "prn", "console.jpg"),
    *("．．", "‥", "․․", "…", "／", "／etc", "．．／x", "＼", "．．＼x"),
    *("Ｃ：", "Ｃ：x", "ＣＯＮ", "ｎｕｌ.jpg", "﹨..", "∕..∕"),
    *("file:", "file://x", "s3::x", "::", "a::b.jpg", "link", "inner", "loop"),
    *("é", "e\u0301", "\u202egpj.exe", "\u200b.."),
    *("a\x00b", "a\nb", "a\u2028b", "\ud800.jpg", "\x7f", "\x85", "K.jpg", "ſ.jpg", "ﬁ.jpg"),
]
FORMS = (None, "NFC", "NFD", "NFKC", "NFKD")


def attempts(count: int = 6000) -> list[str]:
    rng = random.Random(3)
    found = {"/".join(rng.choices(PIECES, k=rng.randint(1, 4))) for _ in range(count)}
    found |= {"/" + path for path in rng.sample(sorted(found), 200)}
    return sorted(found | set(PIECES))


def accepted(paths: list[str]) -> list[str]:
    good = set()
    for path in paths:
        try:
            good.add(safe_relative(path))
        except SourceError as error:
            assert error.code in ("UNSAFE_PATH", "EMPTY_PATH")
    return sorted(good)


def test_no_system_would_leave_out_by_an_accepted_path() -> None:
    good = accepted(attempts())
    assert len(good) > 300, "not everything is refused"
    for path in good:
        assert safe_relative(path) == path
        for form in FORMS:  # some file systems, and some conversions, put names into another form
            name = unicodedata.normalize(form, path) if form else path
            assert posixpath.normpath(posixpath.join("/out", name)).startswith("/out/"), (path, form)
            name = re.sub(r"(?<![^/])([^A-Za-z/]):", r"\1_", name)  # ntpath takes other things than letters for drives
            there = ntpath.normpath(ntpath.join("C:\\out", *name.split("/")))
            assert there.startswith("C:\\out\\"), (path, form)
            for part in PureWindowsPath(there).parts[2:]:
                assert not PureWindowsPath(part.rstrip(". ")).is_reserved() and part.strip(". "), (path, form)


def test_names_that_only_look_odd_are_accepted() -> None:
    for path in ("Ä/ö ü.jpg", "東京／大阪.jpg", "9:30.jpg", "a…b.jpg", ".x.jpg", "console/fig.jpg", "日本"):
        assert safe_relative(path) == path and safe_relative(f"./{path}") == path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """OUT with links that lead out of it, to another of its folders and to themselves; treasures around it."""
    out = tmp_path / "out"
    (out / "other").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for file in ("outside/b.jpg", "b.jpg", "a", "out/other/b.jpg"):
        (tmp_path / file).write_bytes(b"treasure")
    (out / "link").symlink_to(tmp_path / "outside")
    (out / "inner").symlink_to(out / "other")
    (out / "loop").symlink_to(out / "loop")
    return tmp_path


def around(place: Path) -> dict[str, bytes | str]:
    found = {}
    for folder, _, names in os.walk(place):
        if not folder.startswith(str(place / "out")) or folder == str(place / "out/other"):
            found |= {os.path.join(folder, name): Path(folder, name).read_bytes() for name in names}
    return found


def test_writing_and_removing_stay_inside(place: Path) -> None:
    before, wrote = around(place), 0
    digest = hashlib.sha256(b"treasure").hexdigest()
    rng = random.Random(4)
    paths = attempts()
    nasty = [path for path in paths if {"link", "inner", "loop"} & set(path.split("/"))]
    for path in rng.sample(nasty, min(150, len(nasty))) + rng.sample(paths, 150):
        try:
            where = write_output(str(place / "out"), path, b"protected")
            assert os.path.realpath(where) == where and where.startswith(str(place / "out") + "/"), path
            wrote += 1
        except OutputError:
            pass
        try:
            remove_output(str(place / "out"), path, {digest})
        except OutputError:
            pass
        assert around(place) == before, path
    assert wrote > 15


@pytest.mark.parametrize("folder", ["link", "inner", "loop"])
def test_links_in_out_are_not_followed(place: Path, folder: str) -> None:
    with pytest.raises(OutputError):
        write_output(str(place / "out"), f"{folder}/b.jpg", b"protected")
    with pytest.raises(OutputError):
        remove_output(str(place / "out"), f"{folder}/b.jpg", {hashlib.sha256(b"treasure").hexdigest()})
    assert (place / "outside/b.jpg").read_bytes() == (place / "out/other/b.jpg").read_bytes() == b"treasure"


def test_a_link_in_the_place_of_an_output_is_replaced_and_not_written_through(place: Path) -> None:
    (place / "out/c.jpg").symlink_to(place / "outside/b.jpg")
    write_output(str(place / "out"), "c.jpg", b"protected")
    assert (place / "outside/b.jpg").read_bytes() == b"treasure" and not (place / "out/c.jpg").is_symlink()


def test_tables_of_photos_give_only_safe_paths(tmp_path: Path) -> None:
    paths = {}
    for path in attempts():
        if path and "\ud800" not in path:  # Parquet holds UTF-8
            # A table with doubled paths is refused as a whole.
            paths[posixpath.normpath(path.split("//")[-1]).lstrip("/")] = path
    pq.write_table(pa.table({"path": sorted(paths.values())}), tmp_path / "photos.parquet")
    rows = list(list_photos(str(tmp_path / "photos.parquet")))
    assert len(rows) > 500
    for row in rows:
        if row.code not in ("UNSAFE_PATH", "EMPTY_PATH", "NAME_NOT_UTF8"):
            assert safe_relative(row.path) == row.path


def test_a_store_keeps_them_below_its_folder() -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    before = set(fs.store)
    for path in attempts()[::20]:
        try:
            assert write_output("memory://paths/out", path, b"x").startswith("memory:///paths/out/")
        except OutputError:
            pass
    written = set(fs.store) - before
    assert written and all(name.startswith("/paths/out/") for name in written)
