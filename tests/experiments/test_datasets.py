"""Readers on generated trees of the data sets' layouts; photos are never opened."""

from pathlib import Path

import pytest

from pipelines.experiments.datasets import DatasetError, DatasetPhoto, read_dataset
from pipelines.experiments.protocol import choose, lay_out


def tree(folder: Path, *paths: str) -> Path:
    for path in paths:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.encode())
    return folder


@pytest.mark.parametrize("inner", ["", "lfw/", "lfw-deepfunneled/"])
def test_lfw(tmp_path, inner):
    paths = ["Ann_Lee/Ann_Lee_0001.jpg", "Ann_Lee/Ann_Lee_0002.jpg", "Bo/Bo_0001.jpg", "Bo/thumbs.jpg", "Bo/notes.txt"]
    root = tree(tmp_path, *(inner + p for p in paths), "README.md")
    got = list(read_dataset("lfw", root))
    assert got == [
        DatasetPhoto(inner + paths[0], "Ann_Lee"),
        DatasetPhoto(inner + paths[1], "Ann_Lee"),
        DatasetPhoto(inner + paths[2], "Bo"),
    ]
    with pytest.raises(DatasetError, match="not LFW"):
        list(read_dataset("lfw", tree(tmp_path / "other", "a/b.jpg")))


def test_celeba_hq_with_masks(tmp_path):
    root = tree(tmp_path, *(f"CelebA-HQ-img/{i}.jpg" for i in (0, 1, 2, 10)))
    with pytest.raises(DatasetError, match="mapping.txt and identity_CelebA.txt"):
        list(read_dataset("celeba-hq", root))
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text(
        "idx   orig_idx   orig_file\n0   119613   119614.jpg\n1   99094   099095.jpg\n2   7   000008.jpg\n"
        "10   8   000009.jpg\n"
    )
    (root / "identity_CelebA.txt").write_text("119614.jpg 33\n099095.jpg 33\n000008.jpg 7\n000009.jpg 8\n")
    got = list(read_dataset("celeba-hq", root))
    assert [(p.path, p.person, p.split) for p in got] == [
        ("CelebA-HQ-img/0.jpg", "33", None),
        ("CelebA-HQ-img/1.jpg", "33", None),
        ("CelebA-HQ-img/2.jpg", "7", None),
        ("CelebA-HQ-img/10.jpg", "8", None),
    ]
    (root / "list_eval_partition.txt").write_text("119614.jpg 0\n099095.jpg 1\n000008.jpg 2\n")
    assert [p.split for p in read_dataset("celeba-hq", root)] == ["train", "valid", "test", None]
    (root / "identity_CelebA.txt").write_text("119614.jpg 33\n")
    with pytest.raises(DatasetError, match="1.jpg has no person"):
        list(read_dataset("celeba-hq", root))


def test_celeba_hq_by_person(tmp_path):
    root = tree(tmp_path, "train/12/a.jpg", "train/12/b.jpg", "test/12/c.png", "train/readme.txt", "train/x/d.jpg")
    assert list(read_dataset("celeba-hq", root)) == [
        DatasetPhoto("train/12/a.jpg", "12", "train"),
        DatasetPhoto("train/12/b.jpg", "12", "train"),
        DatasetPhoto("test/12/c.png", "12", "test"),
    ]
    with pytest.raises(DatasetError, match="not CelebA-HQ"):
        list(read_dataset("celeba-hq", tree(tmp_path / "other", "x/y.jpg")))


@pytest.mark.parametrize("inner", ["", "VGGface2_None_norm_512_true_bygfpgan/"])
def test_vggface2_hq(tmp_path, inner):
    root = tree(
        tmp_path,
        f"{inner}n000002/0001_01.jpg",
        f"{inner}n000002/0002_01.jpg",
        f"{inner}n000003/0001_01.jpg",
        f"{inner}other/0001.jpg",
    )
    assert [(p.path, p.person) for p in read_dataset("vggface2-hq", root)] == [
        (f"{inner}n000002/0001_01.jpg", "n000002"),
        (f"{inner}n000002/0002_01.jpg", "n000002"),
        (f"{inner}n000003/0001_01.jpg", "n000003"),
    ]
    with pytest.raises(DatasetError, match="not VGGFace2-HQ"):
        list(read_dataset("vggface2-hq", tree(tmp_path / "other", "x/y.jpg")))


def test_no_such_data_set(tmp_path):
    with pytest.raises(DatasetError, match="lfw, celeba-hq, vggface2-hq"):
        read_dataset("ffhq", tmp_path)
    with pytest.raises(DatasetError, match="no such folder"):
        read_dataset("lfw", tmp_path / "nowhere")


def photos(people: int, each: int) -> list[DatasetPhoto]:
    return [DatasetPhoto(f"p{i:02d}/p{i:02d}_{n:04d}.jpg", f"p{i:02d}") for i in range(people) for n in range(each)]


def test_protocol():
    some = photos(20, 3) + [DatasetPhoto(f"q{i}/x.jpg", f"q{i}") for i in range(9)]
    got = choose(some, 8, 12, seed=1)
    assert len(got.probes) == len(got.mates) == 8 and len(got.distractors) == 12
    assert set(got.probes) == set(got.mates) and not set(got.probes) & set(got.distractors)
    assert all(got.probes[p] != got.mates[p] and got.mates[p].startswith(p) for p in got.probes)
    assert choose(reversed(some), 8, 12, seed=1) == got and choose(some, 8, 12, seed=2) != got
    more = choose(some, 11, 12, seed=1)  # goes on from the smaller one
    assert got.probes.items() < more.probes.items() and got.mates.items() < more.mates.items()
    assert len(set(more.distractors) & set(got.distractors)) >= 9
    with pytest.raises(DatasetError, match="21 people"):
        choose(some, 21)


def test_laying_out(tmp_path):
    root = tree(tmp_path / "data", *(p.path for p in photos(6, 2)))
    protocol = choose(photos(6, 2), 2, 3)
    originals, gallery = lay_out(protocol, root, tmp_path / "work")
    names = sorted(p.relative_to(originals).as_posix() for p in originals.rglob("*.jpg"))
    assert names == sorted(protocol.probes.values()) and len(list(gallery.rglob("*.jpg"))) == 5
    assert (originals / names[0]).read_bytes() == names[0].encode()
    before = (originals / names[0]).stat().st_mtime_ns
    more = choose(photos(6, 2), 3, 3)
    lay_out(more, root, tmp_path / "work")
    assert (originals / names[0]).stat().st_mtime_ns == before and len(list(originals.rglob("*.jpg"))) == 3
    lay_out(protocol, root, tmp_path / "work")
    assert sorted(p.relative_to(originals).as_posix() for p in originals.rglob("*.jpg")) == names
    # Another data set of the same names, and a file that was cut short, are copied again.
    other = tree(tmp_path / "other", *(p.path for p in photos(6, 2)))
    for path in protocol.probes.values():
        (tmp_path / "other" / path).write_bytes(b"another photo of " + path.encode())
    lay_out(protocol, other, tmp_path / "work")
    assert (originals / names[0]).read_bytes() == b"another photo of " + names[0].encode()
    (originals / names[0]).write_bytes(b"anoth")
    lay_out(protocol, other, tmp_path / "work")
    assert (originals / names[0]).read_bytes() == b"another photo of " + names[0].encode()
    assert not list((tmp_path / "work").rglob("*.part"))
