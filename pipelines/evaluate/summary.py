"""From the faces' rows to the figures: shares and means by recogniser, subject and distortion, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.evaluate.measure import IDENTITY, LOOK, OTHER, UNPROTECTED, Settings, column
from pipelines.evaluate.pairs import OK
from pipelines.evaluate.statistics import ClusterBootstrap, Distribution, Estimate
from scol_ops.distortions import NONE
from scol_ops.metrics import verification_threshold

AVERAGE = "average"
PROTECTED = "protected"
FARS = (1e-2, 1e-3)
# Statuses of photos that could not be compared, as `counts` have them.
LOST = ("photos_missing", "photos_ambiguous", "photos_unreadable", "photos_shape_differs", "photos_error")
# Of the pictures' measures: range of the distribution.
_RANGES = {
    "jod": (0.0, 10.0),
    "psnr": (0.0, 100.0),
    "ssim": (-1.0, 1.0),
    "flip": (0.0, 1.0),
    "lpips": (0.0, 2.0),
    "mean_change": (0.0, 255.0),
    "max_change": (0.0, 256.0),
}


def far_name(measure: str, far: float) -> str:
    """`verified_own_1e-2`."""
    return f"verified_{measure}_{far_word(far)}"


def far_word(far: float) -> str:
    """`1e-2`."""
    return f"{far:.0e}".replace("e-0", "e-")


@dataclass(frozen=True)
class Judge:
    """A recogniser as it judges this archive.

    Attributes:
        name, fingerprint: see `Recogniser`.
        card_threshold: its own threshold, of its card.
        thresholds: by false accept rate over the gallery's pairs of different people; None where they are too few.
        pairs: how many pairs there were.
        inside: whether the method that is measured used it; such a one counts in no average.
    """

    name: str
    fingerprint: str
    card_threshold: float
    thresholds: dict[float, float | None]
    pairs: int
    inside: bool


def thresholds(embeddings: NDArray[np.float32], fars: Sequence[float] = FARS) -> tuple[dict[float, float | None], int]:
    """Thresholds at false accept rates over all pairs of different people: one (N, dim) unit embedding each."""
    upper = np.triu_indices(len(embeddings), 1)
    scores = (embeddings @ embeddings.T)[upper]
    found = {far: verification_threshold(scores, far) if len(scores) * far >= 1 else None for far in fars}
    return found, len(scores)


@dataclass
class Summary:
    """What `Collector` comes to.

    Attributes:
        counts: photos and faces by what became of them.
        identity: recogniser or `average` -> subject -> variant -> measure -> Estimate or None.
        picture: measure -> variant -> Estimate or None.
        ism, pictures: distributions, by column.
    """

    counts: dict[str, int]
    identity: dict[str, dict[str, dict[str, dict[str, Estimate | None]]]]
    picture: dict[str, dict[str, Estimate | None]]
    distributions: dict[str, Distribution] = field(default_factory=dict)


class Collector:
    """Takes the rows of whole people, piece by piece.

    Args:
        settings: of the measures.
        judges: one a recogniser.
        people: how many there will be: photos of nobody in particular, and faces beside the middle of a photo, are
            people of their own.
        gallery: people in the gallery: among fewer than k others nobody can fail to be one of the first k, so there is
            no Rank-k-U.
    """

    def __init__(self, settings: Settings, judges: Sequence[Judge], people: int, gallery: int) -> None:
        self.settings, self.judges = settings, judges
        # Their own person and, for somebody else's photo, that one are not candidates.
        self._candidates = {PROTECTED: gallery - 1, UNPROTECTED: gallery - 1, OTHER: gallery - 2}
        self._cells = [(s, v) for s in (PROTECTED, UNPROTECTED) for v in settings.variants] + [(OTHER, NONE)]
        self._measures = [
            "ism",
            "mate",
            "rank1_u",
            "rank5_u",
            *(far_name(m, far) for far in FARS for m in ("own", "mate")),
            "accepted_own",
            "accepted_mate",
        ]
        self._counting = [j for j in judges if not j.inside]
        names = [(judge.name, *cell, m) for judge in judges for cell in self._cells for m in self._measures]
        names += [(AVERAGE, *cell, m) for cell in self._cells for m in self._measures]
        pictures = (column(m, "", v) for v in settings.variants for m in settings.picture)
        self._pictures = [*LOOK, *pictures, *settings.whole]
        self._identity_names = names
        self._bootstrap = ClusterBootstrap([*map(str, range(len(names))), *self._pictures], people)
        self.counts: Counter[str] = Counter()
        self.distributions: dict[str, Distribution] = {}
        for judge in judges:
            for subject in ("", UNPROTECTED, OTHER):
                self.distributions[column("ism", judge.name, NONE, subject)] = Distribution(-1, 1)
                self.distributions[column("mate", judge.name, NONE, subject)] = Distribution(-1, 1)
            for variant in settings.distortions:
                self.distributions[column("ism", judge.name, variant)] = Distribution(-1, 1)
        for name in self._pictures:
            bounds = next((r for measure, r in _RANGES.items() if measure in name), None)
            if "@" not in name and bounds:
                self.distributions[name] = Distribution(*bounds)

    def add(self, table: pa.Table) -> None:
        """Rows of `face_schema`."""
        self._count(table)
        well = table.filter(pa.compute.equal(table["status"], OK))
        if not well.num_rows:
            return
        values = {
            name: well[name].to_numpy(zero_copy_only=False).astype(np.float64)
            for name in well.column_names
            if pa.types.is_floating(well.schema.field(name).type)
        }
        first = np.zeros(well.num_rows, bool)
        first[np.unique(well["photo_id"].to_numpy(zero_copy_only=False).astype(str), return_index=True)[1]] = True
        for name in self.settings.whole:  # a photo's own, told with each of its faces: it counts once
            if name in values:
                values[name] = np.where(first, values[name], np.nan)
        for name, found in self.distributions.items():
            found.add(values[name])
        columns = list(self._of_recognisers(values))
        pictures = [np.where(np.isfinite(values[n]), values[n], np.nan) for n in self._pictures]
        self._bootstrap.add(clusters(well), np.stack([*columns, *pictures], 1))

    def _count(self, table: pa.Table) -> None:
        for status, face in zip(table["status"].to_pylist(), table["face_id"].to_pylist(), strict=True):
            if face is None:
                self.counts[f"photos_{status}"] += 1
            else:
                self.counts["faces_measured" if status == OK else "faces_error"] += 1
                self.counts["photos_measured"] += face.endswith("-00")
        faces = table.filter(pa.compute.is_valid(table["face_id"]))
        for name, words in (("detected", "face_not_found_in_protected"), ("same_size", "photos_of_another_size")):
            found = faces[name].to_pylist()
            if name == "same_size":
                found = [v for v, face in zip(found, faces["face_id"].to_pylist(), strict=True) if face.endswith("-00")]
            self.counts[words] += sum(v is False for v in found)
        same = zip(faces["same_bytes"].to_pylist(), faces["face_id"].to_pylist(), strict=True)
        self.counts["photos_unchanged"] += sum(bool(v) and face.endswith("-00") for v, face in same)
        named = [p is not None for p in faces["person_id"].to_pylist()]
        mates = faces["has_mate"].to_pylist()
        self.counts["faces_with_mate"] += sum(map(bool, mates))
        self.counts["faces_without_mate"] += sum(n and not m for n, m in zip(named, mates, strict=True))

    def _of_recognisers(self, values: Mapping[str, NDArray]) -> Iterator[NDArray]:
        sums: dict[tuple[str, str, str], list[NDArray]] = {}
        for judge in self.judges:
            for subject, variant in self._cells:
                own, mate, rank = (
                    values[column(m, judge.name, variant, "" if subject == PROTECTED else subject)] for m in IDENTITY
                )
                ranked = self._candidates[subject]
                found = [own, mate, *(_above(rank, k if ranked >= k else None) for k in (1, 5))]
                for far in FARS:
                    found += [_above(own, judge.thresholds[far]), _above(mate, judge.thresholds[far])]
                found += [_above(own, judge.card_threshold), _above(mate, judge.card_threshold)]
                for measure, column_values in zip(self._measures, found, strict=True):
                    if not judge.inside:
                        sums.setdefault((subject, variant, measure), []).append(column_values)
                    yield column_values
        empty = np.full(len(next(iter(values.values()))), np.nan)
        for subject, variant in self._cells:
            for measure in self._measures:
                some = sums.get((subject, variant, measure))
                yield empty if not some else np.mean(some, 0)  # NaN where a recogniser lacks it

    def summary(self) -> Summary:
        found = self._bootstrap.estimates()
        identity: dict[str, Any] = {}
        for i, (name, subject, variant, measure) in enumerate(self._identity_names):
            identity.setdefault(name, {}).setdefault(subject, {}).setdefault(variant, {})[measure] = found[str(i)]
        if not self._counting:
            identity.pop(AVERAGE)
        picture: dict[str, dict[str, Estimate | None]] = {}
        for name in self._pictures:
            measure, _, variant = name.partition("@")
            picture.setdefault(measure, {})[variant or NONE] = found[name]
        return Summary(dict(self.counts), identity, picture, self.distributions)


def clusters(table: pa.Table) -> list[str]:
    """Whom each face is taken to be of in the bootstrap: its person, or else itself."""
    return [
        "=" + person if person is not None else "?" + face
        for person, face in zip(table["person_id"].to_pylist(), table["face_id"].to_pylist(), strict=True)
    ]


def _above(values: NDArray, limit: float | None) -> NDArray:
    """1 where a value is above a limit, else 0; NaN where there is no value, or no limit."""
    if limit is None:
        return np.full(len(values), np.nan)
    return np.where(np.isnan(values), np.nan, (values > limit).astype(np.float64))
