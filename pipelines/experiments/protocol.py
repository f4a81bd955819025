"""Who is probed and who is in the gallery: one photo each to protect, one other photo each to find them by, and
strangers."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pipelines.experiments.datasets import DatasetError, DatasetPhoto

# Whose results are reported (`make bench-protection`): people of this draw are never developed on.
REPORTED_PEOPLE = 128
REPORTED_SEED = 0
DEVELOPMENT_SEED = 1000  # of draws of development people; a draw's own seed is added

@dataclass(frozen=True)
class Protocol:
    """Paths below a data set's root. `probes`, `mates`: by person, never the same photo; `distractors`: by other
    person."""

    probes: dict[str, str]
    mates: dict[str, str]
    distractors: dict[str, str]


def choose(
    photos: Iterable[DatasetPhoto],
    people: int,
    distractors: int = 1000,
    seed: int = 0,
    exclude: Collection[str] = (),
) -> Protocol:
    """Draw people with two or more photos, and others.

    Args:
        photos: of a data set.
        people: how many to probe; a larger number has those of a smaller one among it, and keeps their photos.
        distractors: most others, one photo each.
        seed: of all draws.
        exclude: people who are neither probed nor in the gallery, as if the data set had none of them.

    Raises:
        DatasetError: fewer people with two photos than asked for.
    """
    by_person: dict[str, list[str]] = {}
    for photo in photos:
        if photo.person not in exclude:
            by_person.setdefault(photo.person, []).append(photo.path)
    several = sorted(person for person, paths in by_person.items() if len(paths) > 1)
    if len(several) < people:
        besides = f" besides {len(exclude)} who are left out" if exclude else ""
        raise DatasetError(f"{people} people with two photos are wanted, there are {len(several)}{besides}")
    random.Random(f"{seed}/people").shuffle(several)
    pairs = {
        person: random.Random(f"{seed}/{person}").sample(sorted(by_person[person]), 2) for person in several[:people]
    }
    others = sorted(set(by_person) - set(pairs))
    # Shuffled as a whole before it is cut: with other numbers of people most distractors stay.
    others.sort(key=lambda person: random.Random(f"{seed}/other/{person}").random())
    chosen = {
        person: random.Random(f"{seed}/{person}").choice(sorted(by_person[person])) for person in others[:distractors]
    }
    return Protocol({p: a for p, (a, _) in pairs.items()}, {p: b for p, (_, b) in pairs.items()}, chosen)


def reported(photos: Sequence[DatasetPhoto]) -> frozenset[str]:
    """People whom `make bench-protection` protects by default; all who have two photos, where these are fewer."""
    counts = Counter(photo.person for photo in photos)
    people = min(REPORTED_PEOPLE, sum(number > 1 for number in counts.values()))
    return frozenset(choose(photos, people, 0, REPORTED_SEED).probes)


def develop(photos: Iterable[DatasetPhoto], people: int, distractors: int = 1000, seed: int = 0) -> Protocol:
    """A draw of people to develop on: as `choose`, without those who are `reported`.

    Raises:
        DatasetError: too few people are left.
    """
    photos = list(photos)
    return choose(photos, people, distractors, DEVELOPMENT_SEED + seed, exclude=reported(photos))


def lay_out(
    protocol: Protocol,
    root: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    drawn: Mapping[str, bytes] = MappingProxyType({}),
) -> tuple[Path, Path]:
    """Copy the photos to `FOLDER/originals/PERSON/` and `FOLDER/gallery/PERSON/`; files that are there already, of the
    source's size and date, stay.

    Photos of an earlier protocol that are not of this one are removed from these two folders.

    Args:
        drawn: of some probes, by person, the file to write in place of the photo's.

    Returns:
        the two folders.
    """
    places = (Path(folder) / "originals", Path(folder) / "gallery")
    made = {places[0] / person / Path(protocol.probes[person]).name: data for person, data in drawn.items()}
    wanted = [protocol.probes, {**protocol.mates, **protocol.distractors}]
    for place, photos in zip(places, wanted, strict=True):
        files = {place / person / Path(path).name: Path(root) / path for person, path in photos.items()}
        for old in place.rglob("*") if place.exists() else ():
            if old.is_file() and old not in files:
                old.unlink()
        for target, source in files.items():
            data = made.get(target)
            # What is there already is left as it is: its time tells its version.
            if not _copied(source, target) if data is None else not target.exists() or target.read_bytes() != data:
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(target.name + ".part")
                shutil.copy2(source, part) if data is None else part.write_bytes(data)
                os.replace(part, target)
    return places


def _copied(source: Path, target: Path) -> bool:
    if not target.exists():
        return False
    here, there = target.stat(), source.stat()
    return here.st_size == there.st_size and abs(here.st_mtime - there.st_mtime) < 2  # some file systems round
