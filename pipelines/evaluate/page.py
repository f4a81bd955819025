"""The evaluation for people to read: tables for a terminal, and one HTML page with examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster.files import Files
from pipelines.archive.paths import SourceError
from pipelines.archive.reading import read_bytes
from pipelines.evaluate.measure import CROP, OTHER, UNPROTECTED, Spot, column
from pipelines.evaluate.pairs import MATES
from pipelines.evaluate.summary import AVERAGE, LOST, PROTECTED, Judge, Summary, far_name
from pipelines.photos.codec import decode
from pipelines.photos.photo import PhotoError
from pipelines.report.charts import histogram_svg, number, ticks_between
from pipelines.report.html import document, escape, name_html
from pipelines.report.pictures import Budget, Pixels, data_url
from pipelines.run.folder import Run
from scol_ops.alignment import align_crops
from scol_ops.distortions import NONE
from scol_ops.metrics import to_uint8

EXAMPLES = 4  # of each kind
PICTURE_BYTES = 6_000_000
AMPLIFICATION = 10
_KINDS = ("best", "median", "worst")


# ---- examples --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A face on the page. `order`: what it was chosen by, `hidden` or `seen`; `kind`: best, median, worst."""

    order: str
    kind: str
    row: dict[str, Any]


class Examples:
    """Collects what the faces are ordered by: 8 bytes a face.

    `hidden`: cosine to the original above the recogniser's own threshold, mean over the recognisers that count; `seen`:
    FLIP over the crop. Lower is better in both.
    """

    def __init__(self, judges: Sequence[Judge]) -> None:
        self._judges = [j for j in judges if not j.inside] or list(judges)
        self._values: dict[str, list[np.ndarray]] = {"hidden": [], "seen": []}

    def add(self, table: pa.Table) -> None:
        """Rows of the faces' table, in the order in which they are written."""
        margins = [table[column("ism", j.name)].to_numpy(zero_copy_only=False) - j.card_threshold for j in self._judges]
        self._values["hidden"].append(np.mean(margins, 0).astype(np.float32))
        self._values["seen"].append(table["flip"].to_numpy(zero_copy_only=False).astype(np.float32))

    def positions(self) -> dict[tuple[str, str], list[int]]:
        """(order, kind) -> rows of the faces' table."""
        out = {}
        for order, pieces in self._values.items():
            values = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
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


def _figure(example: Example, judges: Sequence[Judge], budget: Budget) -> str:
    row = example.row
    who = row["path"] + (
        "" if row["face_id"].endswith("-00") else f", face {int(row['face_id'].rsplit('-', 1)[1]) + 1}"
    )
    crops = _crops(row)
    images = ""
    if crops is not None:
        difference = np.clip(np.abs(crops[1].astype(np.int16) - crops[0]) * AMPLIFICATION, 0, 255).astype(np.uint8)
        urls = [data_url(p) for p in (*crops, difference)]
        if budget.take(urls):
            labels = ("original", "protected", f"difference × {AMPLIFICATION}")
            cells = "".join(
                f'<div><img loading=lazy width=256 height=256 alt="{label}: {escape(who)}" src="{url}">'
                f"<span>{label}</span></div>"
                for url, label in zip(urls, labels, strict=True)
            )
            images = f"<div class=triple>{cells}</div>"
    words = [f"{j.name} {number(row[column('ism', j.name)], 3)}" for j in judges]
    words += [
        f"PSNR {number(row['psnr'], 1, 'dB')}",
        f"SSIM {number(row['ssim'], 3)}",
        f"FLIP {number(row['flip'], 3)}",
    ]
    blink = " <button type=button data-do=blink aria-pressed=false>blink</button>" if images else ""
    caption = f"<figcaption>{name_html(who)}<br>{escape(' · '.join(words))}{blink}</figcaption>"
    return f"<li><figure>{images}{caption}</figure></li>"


def _examples_html(examples: Sequence[Example], judges: Sequence[Judge]) -> str:
    budget = Budget(PICTURE_BYTES)
    titles = {
        "hidden": "Ordered by how well the identity is hidden",
        "seen": "Ordered by how little can be seen (FLIP)",
    }
    text = ""
    for order, title in titles.items():
        text += f"<h3>{title}</h3>"
        for kind in _KINDS:
            cards = "".join(_figure(e, judges, budget) for e in examples if (e.order, e.kind) == (order, kind))
            text += f"<h4>{kind}</h4><ul class=cards>{cards}</ul>" if cards else ""
    return text


# ---- tables ----------------------------------------------------------------------------------------------------------


def _percent(estimate: Mapping[str, Any] | None) -> str:
    return _interval(estimate, 100, 1)


def _interval(estimate: Mapping[str, Any] | None, scale: float = 1, digits: int = 3) -> str:
    if estimate is None:
        return "–"
    text = number(estimate["value"] * scale, digits)
    if estimate["low"] is None:
        return text
    return f"{text} [{number(estimate['low'] * scale, digits)}, {number(estimate['high'] * scale, digits)}]"


IDENTITY_HEAD = (
    "recogniser",
    "photos",
    "Rank-1-U, %",
    "Rank-5-U, %",
    "cosine to the original (ISM)",
    "accepted as the original at FAR 1e-2, %",
    "at FAR 1e-3, %",
    "accepted as another photo of the person at FAR 1e-2, %",
    "at FAR 1e-3, %",
)


def _line(name: str, words: str, cell: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        words,
        _percent(cell["rank1_u"]),
        _percent(cell["rank5_u"]),
        _interval(cell["ism"]),
        *(_percent(cell[far_name(m, far)]) for m in ("own", "mate") for far in (1e-2, 1e-3)),
    )


def identity_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Head and lines: what the recognisers see, of undistorted photos, with the two rows that say what to expect."""
    rows = [IDENTITY_HEAD]
    for name, subjects in figures["identity"].items():
        shown = name + (" (used inside: proves nothing)" if name in figures["inside"] else "")
        rows.append(_line(shown, "unprotected (near 0 expected)", subjects[UNPROTECTED][NONE]))
        rows.append(_line(shown, "protected", subjects[PROTECTED][NONE]))
        rows.append(_line(shown, "somebody else (near 100 expected)", subjects[OTHER][NONE]))
    return rows


def distortion_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Head and lines: what is left after each distortion, and what the distortion does by itself."""
    rows = [
        (
            "recogniser",
            "distortion",
            "Rank-1-U, %",
            "of unprotected photos, %",
            "Rank-5-U, %",
            "ISM",
            "ISM: 5 %",
            "median",
            "95 %",
            "accepted as the original at FAR 1e-2, %",
            "at FAR 1e-3, %",
            "accepted as another photo of the person at FAR 1e-2, %",
            "at FAR 1e-3, %",
        )
    ]
    for name, subjects in figures["identity"].items():
        for variant, cell in subjects[PROTECTED].items():
            spread = figures["distributions"].get(column("ism", name, variant), {})
            rows.append(
                (
                    name,
                    variant,
                    _percent(cell["rank1_u"]),
                    _percent(subjects[UNPROTECTED][variant]["rank1_u"]),
                    _percent(cell["rank5_u"]),
                    _interval(cell["ism"]),
                    *(number(spread.get(p), 3) for p in ("p5", "p50", "p95")),
                    *(_percent(cell[far_name(m, far)]) for m in ("own", "mate") for far in (1e-2, 1e-3)),
                )
            )
    return rows


_MEASURES = {
    "psnr": "PSNR of the face crop, dB",
    "ssim": "SSIM of the face crop",
    "flip": "FLIP of the face crop",
    "lpips": "LPIPS of the face crop",
    "photo_lpips": "LPIPS of the photo",
    "face_psnr": "PSNR of the face alone, dB",
    "face_flip": "FLIP of the face alone",
    "mean_change": "mean change of the crop, levels of 255",
    "max_change": "largest change of the crop, levels",
    "photo_psnr": "PSNR of the photo, dB",
    "photo_ssim": "SSIM of the photo",
    "photo_flip": "FLIP of the photo",
    "photo_mean_change": "mean change of the photo, levels of 255",
    "photo_max_change": "largest change of the photo, levels",
}


def _digits(measure: str) -> int:
    return 2 if "psnr" in measure or "change" in measure else 3


def distorted_picture_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Head and lines: how far apart original and protected photo are after each distortion of both."""
    shown = [measure for measure, variants in figures["picture"].items() if len(variants) > 1]
    rows = [("distortion", *(_MEASURES.get(measure, measure) for measure in shown))]
    for variant in figures["picture"]["psnr"]:
        cells = ((figures["picture"][measure][variant], _digits(measure)) for measure in shown)
        rows.append((variant, *(_interval(estimate, 1, digits) for estimate, digits in cells)))
    return rows


def picture_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Head and lines: what the pictures lost."""
    rows = [("measure", "mean [95 % interval]", "5 %", "median", "95 %", "faces or photos")]
    for measure, variants in figures["picture"].items():
        estimate = variants[NONE]
        spread = figures["distributions"].get(measure, {})
        digits = _digits(measure)
        rows.append(
            (
                _MEASURES.get(measure, measure),
                _interval(estimate, 1, digits),
                *(number(spread.get(p), digits) for p in ("p5", "p50", "p95")),
                str(estimate["n"] if estimate else 0),
            )
        )
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


def headline(figures: Mapping[str, Any]) -> str:
    """Counts as aligned lines."""
    rows = count_rows(figures)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value:>9}" for name, value in rows)


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *body))


def html_table(rows: Iterable[Sequence[str]]) -> str:
    """HTML: the first row is the head, the first column names its row."""
    head, *body = rows
    top = "".join(f"<th scope=col{'' if i == 0 else ' class=n'}>{escape(cell)}</th>" for i, cell in enumerate(head))
    lines = "".join(
        "<tr>"
        + "".join(
            f"<th scope=row>{escape(c)}</th>" if i == 0 else f"<td class=n>{escape(c)}</td>" for i, c in enumerate(row)
        )
        + "</tr>"
        for row in body
    )
    return f"<div class=wide tabindex=0><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"


# ---- the page --------------------------------------------------------------------------------------------------------


def _banner(figures: Mapping[str, Any]) -> str:
    c, problems = figures["counts"], []
    if figures["inside"]:
        problems.append(
            f"Used by the method itself, and left out of the average: {escape(', '.join(figures['inside']))}."
        )
    elif figures["inside_from"] == "unknown":
        problems.append(
            "Which recognisers the method worked through is not known, since no run of scol protect lies beside the "
            "photos: those that it used prove nothing, and count here all the same. Name them with --inside, or say "
            "--inside none."
        )
    if AVERAGE not in figures["identity"]:
        problems.append("<strong>Every recogniser here was used by the method: these figures prove nothing.</strong>")
    lost = sum(c.get(name, 0) for name in LOST)
    if lost:
        problems.append(f'{lost:,} of {c["photos"]:,} photos could not be compared: <a href="#counts">why</a>.')
    if c.get("faces_error"):
        problems.append(f'{c["faces_error"]:,} faces could not be measured: <a href="#counts">why</a>.')
    if c.get("photos_no_face"):
        problems.append(f'{c["photos_no_face"]:,} of {c["photos"]:,} photos show no face that was found.')
    if not c.get("faces_with_mate"):
        if figures["people_from"] is None:
            why = "nobody is named (--people-from)"
        elif c["photos_without_person"] == c["originals"]:
            why = f"none of the photos has a name by {escape(figures['people_from'])}"
        elif not c["gallery_people"]:
            why = "the gallery has nobody: it needs a folder for each person"
        else:
            why = "the gallery has no other photo of these people that shows a face"
        problems.append(f"There is no Rank-1-U, since {why}.")
    bad = lost or c.get("faces_error") or AVERAGE not in figures["identity"]
    kind = "error" if bad else "weak" if problems else "ok"
    text = "".join(f"<p>{p}</p>" for p in problems) or "<p>All photos were compared.</p>"
    return f'<div class="banner {kind}" role=status>{text}</div>'


def _tiles(figures: Mapping[str, Any]) -> str:
    tiles = [("faces", str(figures["counts"].get("faces_measured", 0)))]
    average = figures["identity"].get(AVERAGE)
    if average is not None:
        cell = average[PROTECTED][NONE]
        tiles += [("Rank-1-U, % (average)", _percent(cell["rank1_u"])), ("ISM (average)", _interval(cell["ism"]))]
    for name, words, digits in (("psnr", "PSNR of the face crop, dB", 2), ("ssim", "SSIM", 3), ("flip", "FLIP", 3)):
        tiles.append((words, _interval(figures["picture"][name][NONE], 1, digits)))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value.split(' [')[0])}"
        f"{' <small>[' + escape(value.split(' [')[1]) + '</small>' if ' [' in value else ''}</dd></div>"
        for name, value in tiles
    )
    return f"<dl class=tiles>{cells}</dl>"


def _histograms(summary: Summary, judges: Sequence[Judge]) -> str:
    charts = []
    for judge in judges:
        for measure, words in (("ism", "cosine to the original"), ("mate", "cosine to another photo of the person")):
            charts.append(
                _histogram(
                    summary,
                    column(measure, judge.name),
                    f"{judge.name}: {words}",
                    "cosine",
                    [(judge.card_threshold, "its threshold")],
                )
            )
    charts += [
        _histogram(summary, name, words, axis)
        for name, words, axis in (
            ("psnr", "PSNR of the face crop", "PSNR, dB"),
            ("ssim", "SSIM of the face crop", "SSIM"),
            ("flip", "FLIP of the face crop", "FLIP"),
        )
    ]
    return f"<div class=charts>{''.join(charts)}</div>"


def _histogram(summary: Summary, name: str, title: str, axis: str, marks: Sequence[tuple[float, str]] = ()) -> str:
    found = summary.distributions[name]
    total = int(found.counts.sum())
    if not total:
        return f"<div><h3>{escape(title)}</h3><p class=soft>No face has this measure.</p></div>"
    counts, edges = found.coarse(30)
    ticks = ticks_between(
        min(edges[0], *(m for m, _ in marks), edges[-1]), max(edges[-1], *(m for m, _ in marks), edges[0])
    )
    quantiles = found.to_dict()
    words = (
        f"{total:,} faces: median {number(quantiles['p50'], 3)}, 5 % below {number(quantiles['p5'], 3)}, "
        f"5 % above {number(quantiles['p95'], 3)}"
    )
    if found.infinite:
        words += f"; {found.infinite:,} more unchanged"
    return histogram_svg(counts, edges, ticks, title, axis, words, marks)


def _judges_html(figures: Mapping[str, Any]) -> str:
    rows = [
        (
            "recogniser",
            "weights",
            "its own threshold",
            "threshold at FAR 1e-2 here",
            "at FAR 1e-3",
            "pairs of different people",
        )
    ]
    rows += [
        (
            j["name"] + (" (used inside)" if j["inside"] else ""),
            j["fingerprint"],
            number(j["card_threshold"], 3),
            *(number(t, 3) for t in j["thresholds"].values()),
            f"{j['impostor_pairs']:,}",
        )
        for j in figures["recognisers"]
    ]
    return html_table(rows) + (
        "<p class=soft>Thresholds come from the gallery's pairs of different people; a dash: too few "
        "of them to tell.</p>"
    )


def write_page(
    run: Run, figures: Mapping[str, Any], summary: Summary, judges: Sequence[Judge], examples: Sequence[Example]
) -> None:
    """Write `evaluation.html`."""
    sections = [
        (
            "summary",
            "Summary",
            _tiles(figures) + html_table(identity_rows(figures)) + "<p class=soft>In brackets: 95 % bootstrap "
            "interval over people. Rank-1-U: share of faces whose most similar person in the gallery is not the person "
            "shown; higher hides better. The average is over the recognisers that the method did not use.</p>",
        ),
        ("distortions", "After distortions", html_table(distortion_rows(figures))),
        (
            "pictures",
            "What it cost",
            html_table(picture_rows(figures))
            + "<h3>After distortions</h3><p class=soft>Both photos are distorted alike.</p>"
            + html_table(distorted_picture_rows(figures)),
        ),
        ("examples", "Examples", _examples_html(examples, judges)),
        ("distributions", "Distributions", _histograms(summary, judges)),
        ("counts", "Counts", html_table([("what", "number"), *count_rows(figures)])),
        ("recognisers", "Recognisers", _judges_html(figures)),
    ]
    header = f"<p>{name_html(figures['protected'])} against {name_html(figures['originals'])}</p>{_banner(figures)}"
    page = document("scol: evaluation", "Evaluation of a protected archive", header, sections, "by scol evaluate")
    run.write("evaluation.html", page.encode())
