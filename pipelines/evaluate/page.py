"""The evaluation for people to read: tables for a terminal, and one HTML page with examples (template: page.html)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster.files import Files
from pipelines.archive.paths import SourceError
from pipelines.archive.reading import read_bytes
from pipelines.evaluate.answers import section_values
from pipelines.evaluate.measure import CROP, OTHER, UNPROTECTED, Spot, column
from pipelines.evaluate.pairs import MATES
from pipelines.evaluate.summary import AVERAGE, FARS, LOST, PROTECTED, Judge, Summary, far_name
from pipelines.photos.codec import decode
from pipelines.photos.photo import PhotoError
from pipelines.report import html
from pipelines.report.charts import Histogram, Tile, number, ticks_between
from pipelines.report.pictures import Budget, FaceFigure, Pixels, difference, triple
from pipelines.run.folder import Run
from pipelines.run.text_tables import aligned, estimate, markdown
from scol_ops.alignment import align_crops
from scol_ops.distortions import NONE
from scol_ops.metrics import to_uint8

EXAMPLES = 4  # of each kind
PICTURE_BYTES = 6_000_000
_KINDS = ("best", "median", "worst")


# ---- examples --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A face on the page. `order`: what it was chosen by, `hidden` or `seen`; `kind`: best, median, worst."""

    order: str
    kind: str
    row: dict[str, Any]


class Examples:
    """Collects what the faces are ordered by: 12 bytes a face.

    `hidden`: cosine to the original above the recogniser's own threshold, mean over the recognisers that count; `seen`:
    JOD lost, or, where no face has a JOD (photos of another size), FLIP over the face. Lower is better in both.
    """

    def __init__(self, judges: Sequence[Judge]) -> None:
        self._judges = [j for j in judges if not j.inside] or list(judges)
        self._values: dict[str, list[np.ndarray]] = {"hidden": [], "jod": [], "face_flip": []}

    def add(self, table: pa.Table) -> None:
        """Rows of the faces' table, in the order in which they are written."""
        margins = [table[column("ism", j.name)].to_numpy(zero_copy_only=False) - j.card_threshold for j in self._judges]
        self._values["hidden"].append(np.mean(margins, 0).astype(np.float32))
        for name, sign in (("jod", -1), ("face_flip", 1)):
            self._values[name].append(sign * table[name].to_numpy(zero_copy_only=False).astype(np.float32))

    def positions(self) -> dict[tuple[str, str], list[int]]:
        """(order, kind) -> rows of the faces' table."""
        out = {}
        found = {k: np.concatenate(v) if v else np.zeros(0, np.float32) for k, v in self._values.items()}
        seen = found["jod"] if np.isfinite(found["jod"]).any() else found["face_flip"]
        for order, values in (("hidden", found["hidden"]), ("seen", seen)):
            ranked = np.argsort(values, kind="stable")[: int(np.isfinite(values).sum())]  # NaN goes last
            n = min(EXAMPLES, max(1, len(ranked) // len(_KINDS)))
            middle = max(0, (len(ranked) - n) // 2)
            chosen = (ranked[:n], ranked[middle : middle + n], ranked[::-1][:n])
            out |= {(order, kind): some.tolist() for kind, some in zip(_KINDS, chosen, strict=True)}
        return out


def choose_examples(examples: Examples, faces_url: str) -> list[Example]:
    """Read the chosen rows back from the faces' table."""
    positions = examples.positions()
    wanted = {i for some in positions.values() for i in some}
    rows: dict[int, dict[str, Any]] = {}
    with Files(faces_url).open() as file:
        first = 0
        for batch in pq.ParquetFile(file).iter_batches():
            here = sorted(i - first for i in wanted if first <= i < first + batch.num_rows)
            for i, row in zip(here, batch.take(pa.array(here, pa.int64())).to_pylist() if here else (), strict=True):
                rows[first + i] = row
            first += batch.num_rows
    return [Example(order, kind, rows[i]) for (order, kind), some in positions.items() for i in some]


def _crops(row: Mapping[str, Any]) -> tuple[Pixels, Pixels] | None:
    """The face's crop in the original and at the same place in the protected photo; None where they have gone."""
    try:
        one, two = (decode(read_bytes(row[name])).pixels for name in ("url", "protected_url"))
    except (SourceError, PhotoError):
        return None
    spot = Spot(np.array(row["landmarks"], np.float64).reshape(5, 2), np.array(row["box"], np.float64))
    scale = np.array([two.shape[1] / one.shape[1], two.shape[0] / one.shape[0]])
    there = spot.moved(lambda p: (p + 0.5) * scale - 0.5)
    with torch.no_grad():
        return tuple(to_uint8(align_crops(p, s.quad, CROP)[0]) for p, s in ((one, spot), (two, there)))


def _figure(example: Example, judges: Sequence[Judge], budget: Budget) -> FaceFigure:
    row, crops = example.row, _crops(example.row)
    number_of = int(row["face_id"].rsplit("-", 1)[1]) + 1
    who = row["path"] if number_of == 1 else f"{row['path']}, face {number_of}"
    words = [f"{j.name} {number(row[column('ism', j.name)], 3)}" for j in judges]
    words += [f"JOD {number(row['jod'], 2)}", f"PSNR of the face {number(row['face_psnr'], 1, 'dB')}"]
    words += [f"{m.upper()} {number(row[f'face_{m}'], 3)}" for m in ("ssim", "flip")]
    shown = triple((*crops, difference(*crops)), who, budget, ("original", "protected")) if crops is not None else ()
    return FaceFigure(who, " · ".join(words), shown)


def _figures(examples: Sequence[Example], judges: Sequence[Judge]) -> dict[str, dict[str, list[FaceFigure]]]:
    """Figures by the words that head them: what they are ordered by, kind."""
    budget = Budget(PICTURE_BYTES)
    orders = {"hidden": "how well the identity is hidden", "seen": "how little can be seen"}
    titles = {order: f"Ordered by {words}" for order, words in orders.items()}
    found: dict[str, dict[str, list[FaceFigure]]] = {title: {} for title in titles.values()}
    for example in examples:
        found[titles[example.order]].setdefault(example.kind, []).append(_figure(example, judges, budget))
    return found


# ---- tables ----------------------------------------------------------------------------------------------------------

_ACCEPTED = (
    "accepted as the original at FAR 1e-2, %", "at FAR 1e-3, %",
    "accepted as another photo of the person at FAR 1e-2, %", "at FAR 1e-3, %",
)  # fmt: skip
IDENTITY_HEAD = ("recogniser", "photos", "Rank-1-U, %", "Rank-5-U, %", "cosine to the original (ISM)", *_ACCEPTED)


def _interval(found: Mapping[str, Any] | None, digits: int = 3, scale: float = 1.0) -> str:
    return estimate(found, digits, scale, form=number)


def _percent(found: Mapping[str, Any] | None) -> str:
    return _interval(found, 1, 100)


def _accepted(cell: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_percent(cell[far_name(m, far)]) for m in ("own", "mate") for far in FARS)


def _spread(figures: Mapping[str, Any], name: str, digits: int = 3) -> tuple[str, ...]:
    found = figures["distributions"].get(name, {})
    return tuple(number(found.get(p), digits) for p in ("p5", "p50", "p95"))


def identity_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Head and lines: what the recognisers see, of undistorted photos, with the two rows that say what to expect."""
    subjects = {
        UNPROTECTED: "unprotected (near 0 expected)", PROTECTED: "protected", OTHER: "somebody else (near 100 expected)"
    }  # fmt: skip
    rows = [IDENTITY_HEAD]
    for name, found in figures["identity"].items():
        shown = name + (" (used inside: proves nothing)" if name in figures["inside"] else "")
        for subject, words in subjects.items():
            cell = found[subject][NONE]
            ranks = (_percent(cell["rank1_u"]), _percent(cell["rank5_u"]))
            rows.append((shown, words, *ranks, _interval(cell["ism"]), *_accepted(cell)))
    return rows


def distortion_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Head and lines: what is left after each distortion, and what the distortion does by itself."""
    rows = [(
        "recogniser", "distortion", "Rank-1-U, %", "of unprotected photos, %", "Rank-5-U, %", "ISM", "ISM: 5 %",
        "median", "95 %", *_ACCEPTED,
    )]  # fmt: skip
    for name, subjects in figures["identity"].items():
        for variant, cell in subjects[PROTECTED].items():
            ranks = (cell["rank1_u"], subjects[UNPROTECTED][variant]["rank1_u"], cell["rank5_u"])
            spread = _spread(figures, column("ism", name, variant))
            rows.append((name, variant, *map(_percent, ranks), _interval(cell["ism"]), *spread, *_accepted(cell)))
    return rows


_MEASURES = {
    "jod": "JOD of the face window",
    "jod_4k": "JOD of the face window, 4K display",
    "psnr": "PSNR of the face crop, dB",
    "ssim": "SSIM of the face crop",
    "flip": "FLIP of the face crop",
    "lpips": "LPIPS of the face crop",
    "photo_lpips": "LPIPS of the photo",
    "face_psnr": "PSNR of the face alone, dB",
    "face_ssim": "SSIM of the face alone",
    "face_flip": "FLIP of the face alone",
    "mean_change": "mean change of the crop, levels of 255",
    "max_change": "largest change of the crop, levels",
    "photo_psnr": "PSNR of the photo, dB",
    "photo_ssim": "SSIM of the photo",
    "photo_flip": "FLIP of the photo",
    "photo_mean_change": "mean change of the photo, levels of 255",
    "photo_max_change": "largest change of the photo, levels",
}

# Those of what a viewer looks at.
_FACE = {
    "jod": "JOD of the face window", "face_psnr": "PSNR of the face, dB", "face_ssim": "SSIM of the face",
    "face_flip": "FLIP of the face",
}  # fmt: skip


def _digits(measure: str) -> int:
    return 2 if any(word in measure for word in ("jod", "psnr", "change")) else 3


def distorted_picture_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Head and lines: how far apart original and protected photo are after each distortion of both."""
    shown = {measure: variants for measure, variants in figures["picture"].items() if len(variants) > 1}
    rows = [("distortion", *(_MEASURES.get(measure, measure) for measure in shown))]
    for variant in figures["picture"]["psnr"]:
        rows.append((variant, *(_interval(found[variant], _digits(measure)) for measure, found in shown.items())))
    return rows


def picture_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Head and lines: what the pictures lost."""
    rows = [("measure", "mean [95 % interval]", "5 %", "median", "95 %", "faces or photos")]
    for measure, variants in figures["picture"].items():
        found, digits = variants[NONE], _digits(measure)
        mean, number_of = _interval(found, digits), str(found["n"] if found else 0)
        rows.append((_MEASURES.get(measure, measure), mean, *_spread(figures, measure, digits), number_of))
    return rows


def count_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What became of every photo and face."""
    c = figures["counts"]
    words = {
        "originals": "original photos",
        "photos_without_person": "  without a name",
        "photos": "  of them to be measured",
        "photos_measured": "    measured",
        "photos_missing": "    without a protected photo",
        "photos_ambiguous": "    ambiguous by name",
        "photos_unreadable": "    unreadable, they or their protected photo",
        "photos_no_face": "    without a face",
        "photos_shape_differs": "    of another shape than the protected photo",
        "photos_error": "    failed",
        "photos_unchanged": "  protected photos that are the original file",
        "photos_of_another_size": "  of another size",
        "protected_without_original": "protected photos without an original",
        "people_rows_without_photo": "rows of the table of people without a photo",
        "faces_measured": "faces measured",
        "face_not_found_in_protected": "  not found any more in the protected photo (measured at the same place)",
        "faces_error": "  failed",
        "faces_with_mate": "  with another photo of the person (Rank-1-U counts these)",
        "faces_without_mate": f"  named, without another usable photo (the first {MATES} are tried)",
        "people": "people",
        "gallery_people": "people in the gallery",
        "gallery_people_without_face": f"  left out: no face in the first {MATES} photos",
        "gallery_photos_unusable": "photos of the gallery that are unreadable or in nobody's folder",
    }
    return [(text, str(c.get(key, 0))) for key, text in words.items()]


def _recogniser_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    limits = ("its own threshold", "threshold at FAR 1e-2 here", "at FAR 1e-3")
    rows = [("recogniser", "weights", *limits, "pairs of different people")]
    for j in figures["recognisers"]:
        name = j["name"] + (" (used inside)" if j["inside"] else "")
        limits = (number(limit, 3) for limit in (j["card_threshold"], *j["thresholds"].values()))
        rows.append((name, j["fingerprint"], *limits, f"{j['impostor_pairs']:,}"))
    return rows


def table_words(figures: Mapping[str, Any]) -> str:
    """The result in a few lines for a terminal."""
    return aligned(count_rows(figures), "<", ">9") + "\n\n" + markdown(identity_rows(figures))


# ---- the page --------------------------------------------------------------------------------------------------------


def _no_rank(figures: Mapping[str, Any]) -> str | None:
    """Why there is no Rank-1-U."""
    c = figures["counts"]
    if c.get("faces_with_mate"):
        return None
    if figures["people_from"] is None:
        return "nobody is named (--people-from)"
    if c["photos_without_person"] == c["originals"]:
        return f"none of the photos has a name by {figures['people_from']}"
    if not c["gallery_people"]:
        return "the gallery has nobody: it needs a folder for each person"
    return "the gallery has no other photo of these people that shows a face"


def _tiles(figures: Mapping[str, Any]) -> list[Tile]:
    found = [("faces", str(figures["counts"].get("faces_measured", 0)))]
    average = figures["identity"].get(AVERAGE)
    if average is not None:
        cell = average[PROTECTED][NONE]
        found += [("Rank-1-U, % (average)", _percent(cell["rank1_u"])), ("ISM (average)", _interval(cell["ism"]))]
    for name, words in _FACE.items():
        found.append((words, _interval(figures["picture"][name][NONE], _digits(name))))
        if name == "jod":
            found.append(("JOD, 5 % of the faces below", _spread(figures, name, 2)[0]))
    split = ((name, *value.partition(" ")) for name, value in found)
    return [Tile(name, value, small=interval) for name, value, _, interval in split]


def _histograms(summary: Summary, judges: Sequence[Judge]) -> list[Histogram]:
    charts = []
    for judge in judges:
        mark = (judge.card_threshold, "its threshold")
        for measure, words in (("ism", "cosine to the original"), ("mate", "cosine to another photo of the person")):
            charts.append(_histogram(summary, column(measure, judge.name), f"{judge.name}: {words}", "cosine", [mark]))
    for name, words in _FACE.items():
        charts.append(_histogram(summary, name, words.removesuffix(", dB"), words))
    return charts


def _histogram(
    summary: Summary, name: str, title: str, axis: str, marks: Sequence[tuple[float, str]] = ()
) -> Histogram:
    found = summary.distributions[name]
    total = int(found.counts.sum())
    if not total:
        return Histogram(title, "No face has this measure")
    counts, edges = found.coarse(30)
    places = [edges[0], edges[-1], *(x for x, _ in marks)]
    q = {key: number(found.to_dict()[key], 3) for key in ("p5", "p50", "p95")}
    words = f"{total:,} faces: median {q['p50']}, 5 % below {q['p5']}, 5 % above {q['p95']}"
    if found.infinite:
        words += f"; {found.infinite:,} more unchanged"
    return Histogram.of(counts, edges, ticks_between(min(places), max(places)), title, axis, words, marks)


def write_page(
    run: Run, figures: Mapping[str, Any], summary: Summary, judges: Sequence[Judge], examples: Sequence[Example]
) -> None:
    """Write `evaluation.html`."""
    counts = Counter(figures["counts"])
    page = html.render(
        "evaluate/page.html",
        figures=figures,
        c=counts,
        lost=sum(counts[name] for name in LOST),
        counting=AVERAGE in figures["identity"],
        no_rank=_no_rank(figures),
        tiles=_tiles(figures),
        identity=identity_rows(figures),
        distortions=distortion_rows(figures),
        pictures=picture_rows(figures),
        distorted_pictures=distorted_picture_rows(figures),
        examples=_figures(examples, judges),
        charts=_histograms(summary, judges),
        counts=[("what", "number"), *count_rows(figures)],
        recognisers=_recogniser_rows(figures),
        **section_values(figures.get("viewers")),
    )
    run.write("evaluation.html", page.encode())
