from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.evaluate import pairs
from pipelines.evaluate.errors import EvaluateError
from pipelines.evaluate.pairs import Pairing, pair_up, stem


def tree(folder: Path, *paths: str) -> str:
    for path in paths:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.encode())  # the listing opens nothing
    return str(folder)


def pairing(tmp_path: Path, originals: str, protected: str, **options) -> Pairing:
    work = tmp_path / "work"
    work.mkdir()
    return Pairing(originals, protected, folder=work, **({"gallery": None, "people_from": None} | options))


def rows(found: Pairing) -> dict[str, dict]:
    tables = list(found.tables())
    out = {row["path"]: row for table in tables for row in table.to_pylist()}
    assert len(out) == sum(t.num_rows for t in tables) == found.counts.photos
    return out


def test_stem():
    assert stem("a/b.c/d.tar.gz") == "a/b.c/d.tar" and stem("x.JPG") == "x" and stem("a/.hidden") == "a/.hidden"
    assert stem("a/x_cloaked.png", "_cloaked") == "a/x" and stem("_cloaked.png", "_cloaked") == "_cloaked"


def test_pairs_by_path_without_suffix(tmp_path):
    one = tree(tmp_path / "one", "p/a.jpg", "p/b.jpg", "q/b.jpg", "top.png", "p/notes.txt", "p/c.jpg")
    two = tree(tmp_path / "two", "p/a.png", "p/b.jpg", "q/b.webp", "top.png", "new/x.jpg")
    found = pairing(tmp_path, one, two, people_from="folder")
    got = rows(found)
    assert {p: r["protected_path"] for p, r in got.items()} == {
        "p/a.jpg": "p/a.png",
        "p/b.jpg": "p/b.jpg",
        "q/b.jpg": "q/b.webp",
        "top.png": "top.png",
        "p/c.jpg": None,
    }
    assert got["p/c.jpg"]["status"] == "missing" and got["p/c.jpg"]["reason"].startswith("MISSING")
    assert (found.counts.extra, found.counts.extra_examples) == (1, ["new/x.jpg"])
    assert found.counts.skipped == {"NOT_A_PHOTO": 1} and found.counts.unnamed == 1
    assert [r["person_id"] for r in got.values()] == ["p", "p", "p", "q", None]
    # Mates: other photos of the folder, whether they have a protected photo or not.
    assert {m.rsplit("/", 1)[1] for m in got["p/a.jpg"]["mates"]} == {"b.jpg", "c.jpg"} and not got["q/b.jpg"]["mates"]


def test_names_that_several_share_are_not_guessed():
    def listed(*paths):
        return [{"stem": stem(p), "path": p, "url": p, "version": "1/1", "person": None, "error": None} for p in paths]

    def got(originals, protected):
        out, extra = pair_up(listed(*originals), listed(*protected))
        return [(r["path"], r["protected_path"], r["status"]) for r in out], extra

    assert got(["a.jpg", "a.png"], ["a.jpg", "a.png"]) == ([("a.jpg", "a.jpg", "ok"), ("a.png", "a.png", "ok")], [])
    assert got(["a.jpg", "a.png"], ["a.jpg", "a.webp"]) == ([("a.jpg", "a.jpg", "ok"), ("a.png", "a.webp", "ok")], [])
    assert got(["a.jpg", "a.png"], ["a.jpg"]) == ([("a.jpg", "a.jpg", "ok"), ("a.png", None, "missing")], [])
    assert got(["a.jpg", "a.png"], ["a.webp"]) == ([("a.jpg", None, "ambiguous"), ("a.png", None, "ambiguous")], [])
    assert got(["a.jpg"], ["a.webp", "a.png"]) == ([("a.jpg", None, "ambiguous")], [])
    assert got(["a.jpg"], ["a.jpg", "a.png"]) == ([("a.jpg", "a.jpg", "ok")], ["a.png"])


def test_protected_names_go_before_copies_of_the_originals(tmp_path):
    one = tree(tmp_path / "one", "a.jpg", "b.jpg", "b.png", "c.jpg")
    two = tree(tmp_path / "two", "a.jpg", "a_cloaked.png", "b_cloaked.jpg", "b_cloaked.png", "c.jpg")
    found = pairing(tmp_path, one, two, drop="_cloaked")
    assert {p: r["protected_path"] for p, r in rows(found).items()} == {
        "a.jpg": "a_cloaked.png",
        "b.jpg": "b_cloaked.jpg",
        "b.png": "b_cloaked.png",
        "c.jpg": "c.jpg",  # nothing else is there
    }
    assert found.counts.extra_examples == ["a.jpg"]
    (tmp_path / "again").mkdir()
    mixed = tree(tmp_path / "mixed", "p/a.jpg", "p/a_cloaked.png", "p/b.jpg", "p/b_cloaked.png")
    found = pairing(tmp_path / "again", mixed, mixed, drop="_cloaked", people_from="folder")
    got = rows(found)
    assert {p: r["protected_path"] for p, r in got.items()} == {
        "p/a.jpg": "p/a_cloaked.png",
        "p/b.jpg": "p/b_cloaked.png",
    }
    assert [m.rsplit("/", 1)[1] for m in got["p/a.jpg"]["mates"]] == ["b.jpg"] and found.counts.extra == 0
    assert [[u.rsplit("/", 1)[1] for u, _ in r.photos] for r in found.references] in (
        [["a.jpg", "b.jpg"]],
        [["b.jpg", "a.jpg"]],
    )


def test_people_from_a_table(tmp_path):
    one = tree(tmp_path / "one", "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    two = tree(tmp_path / "two", "1_cloaked.png", "2_cloaked.png", "3_cloaked.png")
    table = tmp_path / "people.csv"
    table.write_text("path,person_id,age\n1.jpg,007,3\n2,007,4\n3.jpg,ann,5\n")
    got = rows(pairing(tmp_path, one, two, people_from=str(table), drop="_cloaked"))
    assert [(r["person_id"], r["status"]) for r in got.values()] == [
        ("007", "ok"),
        ("007", "ok"),
        ("ann", "ok"),
        (None, "missing"),
    ]
    table.write_text("path,person_id\n1.jpg,a\n1,b\n")
    (tmp_path / "again").mkdir()
    with pytest.raises(EvaluateError, match="two people"):
        pairing(tmp_path / "again", one, two, people_from=str(table), drop="_cloaked")
    table.write_text("path,person_id\n./1.jpg,0\nsub/../2.jpg,1\n4.png,ann\nnobody.jpg,ann\n")
    (tmp_path / "fourth").mkdir()
    found = pairing(tmp_path / "fourth", one, two, people_from=str(table), drop="_cloaked")
    assert [r["person_id"] for r in rows(found).values()] == ["0", "1", None, None]  # 4.png is not 4.jpg
    assert (found.counts.unnamed, found.counts.people_rows_unused) == (2, 2)
    table.write_text("file,person\n1.jpg,a\n")
    (tmp_path / "third").mkdir()
    with pytest.raises(EvaluateError, match="BAD_PEOPLE"):
        pairing(tmp_path / "third", one, two, people_from=str(table))


def test_two_photos_of_one_stem_have_each_its_person(tmp_path):
    one = tree(tmp_path / "one", "a.jpg", "a.png", "x.v2.jpg")
    table = tmp_path / "people.parquet"
    pq.write_table(pa.table({"path": ["a.jpg", "a.png", "x.v2"], "person_id": [0, 1, 2]}), table)
    got = rows(pairing(tmp_path, one, one, people_from=str(table)))
    assert {p: r["person_id"] for p, r in got.items()} == {"a.jpg": "0", "a.png": "1", "x.v2.jpg": "2"}


def test_names_of_a_gallery_begin_anew(tmp_path):
    one = tree(tmp_path / "one", "Ada/1.jpg", "Ada/1.png")
    others = tmp_path / "others"
    tree(others, "Ada/1.jpg", "flat.jpg")
    (others / "Ada/1.jpg").write_bytes(b"another picture, of another size")
    found = pairing(tmp_path, one, one, gallery=str(others), people_from="folder")
    assert [len(r["mates"]) for r in rows(found).values()] == [1, 1]
    assert (len(found.references), found.counts.gallery_photos, found.counts.gallery_unusable) == (1, 1, 1)
    (tmp_path / "again").mkdir()
    again = pairing(tmp_path / "again", one, one, people_from="folder")  # there it is one photo in two formats
    assert [r["mates"] for r in rows(again).values()] == [[], []]


def test_a_gallery_gives_mates_and_people_to_be_mistaken_for(tmp_path):
    one = tree(tmp_path / "one", *(f"p{i}/x.jpg" for i in range(5)))
    others = tree(
        tmp_path / "others",
        *(f"p{i}/x.jpg" for i in range(2)),
        *(f"p{i}/mate.jpg" for i in range(4)),
        *(f"q{i}/{n}.jpg" for i in range(30) for n in range(5)),
    )
    found = pairing(tmp_path, one, one, gallery=others, people_from="folder", references=12)
    # p0/x.jpg of the gallery has the path, name and size of the probe: it is the probe.
    assert {p: [m.rsplit("/", 1)[1] for m in r["mates"]] for p, r in rows(found).items()} == {
        "p0/x.jpg": ["mate.jpg"],
        "p1/x.jpg": ["mate.jpg"],
        "p2/x.jpg": ["mate.jpg"],
        "p3/x.jpg": ["mate.jpg"],
        "p4/x.jpg": [],
    }
    people = [r.person for r in found.references]
    assert len(people) == 12 and {"p0", "p1", "p2", "p3"} < set(people)
    assert all(len(r.photos) == 3 for r in found.references if r.person[0] == "q")
    (tmp_path / "again").mkdir()
    again = pairing(tmp_path / "again", one, one, gallery=others, people_from="folder", references=12)
    assert again.references == found.references
    (tmp_path / "seed").mkdir()
    other = pairing(tmp_path / "seed", one, one, gallery=others, people_from="folder", references=12, seed=1)
    assert other.references != found.references


def test_a_sample_is_of_the_size_asked_for_and_keeps_the_gallery(tmp_path):
    one = tree(tmp_path / "one", *(f"p{i}/{n}.jpg" for i in range(20) for n in range(2)))
    found = pairing(tmp_path, one, one, people_from="folder", limit=7)
    assert len(rows(found)) == 7 and found.counts.originals == 40 and len(found.references) == 20
    assert all(len(r["mates"]) == 1 for r in rows(found).values())


def test_many_photos_are_joined_piece_by_piece(tmp_path, monkeypatch):
    """With room for a few rows only, the result is the same, and a person's photos stay together."""
    one = tree(tmp_path / "one", *(f"p{i}/{n}.jpg" for i in range(12) for n in range(3)))
    whole = rows(pairing(tmp_path, one, one, people_from="folder"))
    monkeypatch.setattr(pairs, "_ROWS_AT_ONCE", 5)
    monkeypatch.setattr(pairs, "_ONE_PIECE", 5)
    (tmp_path / "again").mkdir()
    found = pairing(tmp_path / "again", one, one, people_from="folder")
    assert rows(found) == whole
    pieces = [set(t["person_id"].to_pylist()) for t in found.tables()]
    assert len(pieces) > 1 and max(Counter(p for piece in pieces for p in piece).values()) == 1


def test_nothing_to_compare(tmp_path):
    one, two = tree(tmp_path / "one", "a.jpg"), tree(tmp_path / "two", "b.jpg")
    with pytest.raises(EvaluateError, match="NO_PAIRS"):
        pairing(tmp_path, one, two)
    (tmp_path / "x").mkdir()
    with pytest.raises(EvaluateError, match="EMPTY"):
        pairing(tmp_path / "x", tree(tmp_path / "empty", "notes.txt"), two)
