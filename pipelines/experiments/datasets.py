"""Data sets of the field, as they are distributed: whose photo lies where.

- lfw (vis-www.cs.umass.edu/lfw): `ROOT[/lfw, /lfw_funneled, /lfw-deepfunneled]/NAME/NAME_0001.jpg`; the
  folder is the person.
- celeba-hq: `ROOT/CelebA-HQ-img/0.jpg` with `CelebA-HQ-to-CelebA-mapping.txt` (CelebAMask-HQ's, columns idx, orig_idx,
  orig_file), `identity_CelebA.txt` (CelebA's) and perhaps `list_eval_partition.txt` (its split) beside it; or, as
  CelebA-HQ facial identity, `ROOT[/train, /test]/NUMBER/*.jpg`.  The number is the person.
- vggface2-hq (github.com/NNNNAI/VGGFace2-HQ): `ROOT[/one folder]/n000001/*.jpg`; the folder is the person.

Readers go through folders and small text files only; no photo is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class DatasetError(ValueError):
    """A folder that does not have the data set's layout. `str()` says what is missing."""


@dataclass(frozen=True, slots=True)
class DatasetPhoto:
    """`path`: below the root, POSIX. `person`: as the data set names them. `split`: train, valid, test, or None."""

    path: str
    person: str
    split: str | None = None


def _photos(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.is_file() and e.name.lower().endswith(SUFFIXES))


def _people(root: Path, name: Callable[[str], bool]) -> Iterator[tuple[str, Path]]:
    for entry in sorted(os.scandir(root), key=lambda e: e.name):
        if entry.is_dir() and name(entry.name):
            yield entry.name, Path(entry.path)


def _by_folder(
    root: Path, below: Path, name: Callable[[str], bool], split: str | None = None
) -> Iterator[DatasetPhoto]:
    for person, folder in _people(below, name):
        for photo in _photos(folder):
            yield DatasetPhoto((folder / photo).relative_to(root).as_posix(), person, split)


def read_lfw(root: Path) -> Iterator[DatasetPhoto]:
    """Labeled Faces in the Wild: photos are `NAME/NAME_NUMBER.jpg`."""
    below = next((root / n for n in ("lfw", "lfw_funneled", "lfw-deepfunneled") if (root / n).is_dir()), root)
    count = 0
    for photo in _by_folder(root, below, lambda n: not n.startswith(".")):
        if re.fullmatch(re.escape(photo.person) + r"_\d+\.\w+", photo.path.rsplit("/", 1)[-1]):
            count += 1
            yield photo
    if not count:
        raise DatasetError(f"{root}: not LFW: no NAME/NAME_0001.jpg below it")


def _pairs(file: Path) -> dict[str, str]:
    """First and last word of each line of a text file."""
    out = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if len(words) >= 2:
            out[words[0]] = words[-1]
    return out


def read_celeba_hq(root: Path) -> Iterator[DatasetPhoto]:
    """CelebA-HQ in either layout."""
    pictures = root / "CelebA-HQ-img"
    if not pictures.is_dir():
        found = False
        for split in ("train", "valid", "test", None):
            below = root if split is None else root / split
            if below.is_dir():
                for photo in _by_folder(root, below, str.isdigit, split):
                    found = True
                    yield photo
        if not found:
            raise DatasetError(f"{root}: not CelebA-HQ: neither CelebA-HQ-img nor numbered folders of people")
        return
    needed = [root / "CelebA-HQ-to-CelebA-mapping.txt", root / "identity_CelebA.txt"]
    missing = [file.name for file in needed if not file.is_file()]
    if missing:
        raise DatasetError(f"{root}: CelebA-HQ-img needs {' and '.join(missing)} beside it, or nobody is known")
    original, identity = map(_pairs, needed)
    partition = root / "list_eval_partition.txt"
    splits = _pairs(partition) if partition.is_file() else {}
    names = {"0": "train", "1": "valid", "2": "test"}
    for photo in sorted(_photos(pictures), key=lambda n: (len(n), n)):
        number = photo.rsplit(".", 1)[0]
        file = original.get(number)
        if file is None or file not in identity:
            raise DatasetError(f"{root}: {photo} has no person: {number} or its CelebA file is not in the lists")
        yield DatasetPhoto(f"CelebA-HQ-img/{photo}", identity[file], names.get(splits.get(file, "")))


def read_vggface2_hq(root: Path) -> Iterator[DatasetPhoto]:
    """VGGFace2-HQ: a folder `n` and six digits for each person."""

    def is_person(name: str) -> bool:
        return re.fullmatch(r"n\d{6}", name) is not None

    below = root
    if not any(True for _ in _people(root, is_person)):
        inner = [path for _, path in _people(root, lambda n: True) if any(True for _ in _people(path, is_person))]
        if len(inner) != 1:
            raise DatasetError(f"{root}: not VGGFace2-HQ: no folders n000001 in it or in exactly one folder of it")
        below = inner[0]
    yield from _by_folder(root, below, is_person)


READERS: dict[str, Callable[[Path], Iterator[DatasetPhoto]]] = {
    "lfw": read_lfw,
    "celeba-hq": read_celeba_hq,
    "vggface2-hq": read_vggface2_hq,
}


def read_dataset(name: str, root: str | os.PathLike[str]) -> Iterator[DatasetPhoto]:
    """Photos of a data set, in the order of their paths.

    Raises:
        DatasetError: unknown name, no such folder, or another layout.
    """
    if name not in READERS:
        raise DatasetError(f"unknown data set {name!r}; there are {', '.join(READERS)}")
    if not Path(root).is_dir():
        raise DatasetError(f"{root}: no such folder; {name} is to be put there")
    return READERS[name](Path(root))
