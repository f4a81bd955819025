"""The report of a run: one HTML file without outside assets, made from the manifests (template: run_page.html).

Style codes do not appear in it: whoever has one has the face.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.report import html
from pipelines.report.charts import Histogram, Tile, number, ticks_between
from pipelines.report.pictures import AMPLIFICATION, Budget, FaceFigure, Pixels, difference, heat_map, look, triple
from pipelines.report.run_faces import FacePictures, read_pictures
from pipelines.run.errors import errors
from pipelines.run.folder import Run, RunError
from pipelines.run.schemas import ERROR, NO_FACE, OK, WEAK
from pipelines.run.summary import MEASURES, summary
from pipelines.run.tables import as_run, read_photos, read_stage

SEEN = 24  # faces shown of those whose change is most visible
SAMPLE = 24  # faces shown of those that are well protected
WEAK_SHOWN = 60  # weak faces shown with pictures; the rest by name
PICTURE_BYTES = 12_000_000  # most base64 characters of pictures in a report
_FACE_COLUMNS = ["photo_id", "face_id", "status", "reason", "path", "judge", "max_ism", *MEASURES]
Row = Mapping[str, Any]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 120 else f"{hours:,.1f} h"


def histogram(
    values: Iterable[float | None], title: str, axis: str, marks: Sequence[tuple[float, str]] = (), bins: int = 30
) -> Histogram:
    """A histogram with a line of its statistics; values that are not finite are counted.

    Args:
        values: one a face; None is left out.
        title: heading, and start of the picture's description.
        axis: label of the x axis, with its unit.
        marks: (x, words): dashed lines.
        bins: about how many bars.
    """
    values = [v for v in values if v is not None and not math.isnan(v)]
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return Histogram(title, "No face has this measure yet")
    places = [*finite, *(x for x, _ in marks)]
    low, high = min(places), max(places)
    if high - low < 1e-6:
        pad = max(abs(low) * 0.05, 0.01)
        low, high = low - pad, high + pad
    ticks = ticks_between(low, high)
    counts, edges = np.histogram(finite, bins=bins, range=(ticks[0], ticks[-1]))
    extra = len(values) - len(finite)
    words = (f"{len(finite):,} faces: mean {number(statistics.fmean(finite), 3)}, "
             f"median {number(statistics.median(finite), 3)}, "
             f"from {number(min(finite), 3)} to {number(max(finite), 3)}"
             + (f"; {extra:,} more without a finite value (unchanged faces)" if extra else ""))
    return Histogram.of(counts, edges, ticks, title, axis, words, marks)


def _histograms(faces: Sequence[Row], totals: Row) -> list[Histogram]:
    done = [r for r in faces if r["status"] in (OK, WEAK)]
    limit = totals["max_ism"]
    marks = [] if limit is None else [(limit, f"weak above {number(limit, 3)}")]
    judge = f" by {totals['judge']}" if totals["judge"] else ""
    lower = "ISM, cosine (lower: better protected)"
    charts = {
        "jod": ("JOD of the face window", "JOD (10: no difference; higher: less visible)"),
        "face_psnr": ("PSNR of the face", "PSNR, dB (higher: less visible)"),
        "face_ssim": ("SSIM of the face", "SSIM (higher: less visible)"),
        "psnr": ("PSNR of the face crop", "PSNR, dB (higher: less visible)"),
        "ism": (f"ISM{judge}", lower, marks),
        "ism_jpeg": (f"ISM{judge}, after JPEG 75 and half size", lower, marks),
        "flip": ("FLIP of the face", "FLIP, 0 to 1 (lower: less visible)"),
    }
    columns = {name: [r[name] for r in done] for name in charts}
    shown = [name for name in charts if name in ("psnr", "ism") or any(v is not None for v in columns[name])]
    return [histogram(columns[name], *charts[name]) for name in shown]


def _loop_tiles(loop: Row | None) -> list[Tile]:
    """What the closed loop did, where there was one."""
    if loop is None:
        return []
    some, judged = loop["faces"], loop["judged"]
    return [
        Tile("share of a change kept, mean", number(loop["share"], 2)),
        Tile("faces with less than all of it", f"{loop['less']:,} of {judged:,}"),
        Tile("faces strengthened", f"{some:,} of {judged:,}"),
        Tile("rounds of these, mean", number(loop["rounds"] / some, 1) if some else "–"),
        Tile("hidden, and not seen too much", f"{loop['ended'].get('passed', 0):,} of {judged:,}" if judged else "–"),
    ]


def _tiles(t: Row) -> list[Tile]:
    work = sum(t["stage_seconds"].values())
    photos = [("protected", OK, OK), ("weak", WEAK, WEAK), ("without a face", NO_FACE, ""), ("failed", ERROR, ERROR),
              ("not reached", "pending", ERROR)]
    return [
        Tile("photos", f"{t['photos']:,}"),
        Tile("faces", f"{t['faces']:,}"),
        *(Tile(f"photos {words}", f"{t[key]:,}", kind if t[key] else "") for words, key, kind in photos),
        Tile("faces weak", "–" if t["weak_share"] is None else f"{100 * t['weak_share']:.1f} %",
             WEAK if t["weak_share"] else ""),
        *_loop_tiles(t["strengthened"]),
        Tile("JOD of the face window, mean", number(t["jod"], 2)),
        Tile("JOD, 5 % of the faces below", number((t["spread"]["jod"] or {}).get("p5"), 2)),
        Tile("PSNR of the face, mean", number(t["face_psnr"], 2, "dB")),
        Tile("SSIM of the face, mean", number(t["face_ssim"], 3)),
        Tile("FLIP of the face, mean", number(t["flip"], 3)),
        Tile("ISM, mean", number(t["ism"], 3)),
        Tile("work a face, all stages",
             number(work / t["faces"], 1, "s") if t["faces"] and work and not t["pending"] else "–"),
        *([Tile("wall time", _duration(t["seconds"]))] if t.get("seconds") else []),
    ]  # fmt: skip


def _times(run: Run, stages: Iterable[str]) -> list[tuple[str, int, str, list[float | None], float]]:
    """(stage, rows, total, mean median 95 % most, share in %); empty where no time was recorded."""
    found = {}
    for stage in stages:  # rows that were only carried through took no time
        seconds = read_stage(run, stage, ["seconds"])["seconds"].to_pylist()
        found[stage] = [s for s in seconds if s is not None and math.isfinite(s) and s > 0]
    whole = sum(map(sum, found.values()))
    return [
        (stage, len(some), _duration(sum(some)), [statistics.fmean(some), statistics.median(some),
         float(np.percentile(some, 95)), max(some)] if some else [None] * 4, 100 * sum(some) / whole)
        for stage, some in found.items()
    ] if whole else []  # fmt: skip


# ---- faces -----------------------------------------------------------------------------------------------------------


def _face_words(row: Row) -> str:
    return f"{row['path']}, face {int(row['face_id'].rsplit('-', 1)[1]) + 1}" if row["face_id"] else row["path"]


def _figure(row: Row, pictures: FacePictures | None, budget: Budget, heat: bool) -> FaceFigure | None:
    """None where the budget is used up, or the face has no picture after. `heat`: see `_figures`."""
    changed = None if pictures is None else pictures.difference()
    if changed is None:
        return None
    who = _face_words(row)
    if pictures.windows is None:
        shown = triple((pictures.original, pictures.protected, changed), who, budget)
    else:
        shown = look(*pictures.windows, *_third(*pictures.windows, heat), who, budget)
    words = f"JOD {number(row['jod'], 2)} · PSNR {number(row['psnr'], 1, 'dB')} · ISM {number(row['ism'], 3)}"
    if not pictures.saved:
        words += " (before saving: the saved file could not be read)"
    return FaceFigure(who, words, shown, row["status"], row["reason"] or "") if shown else None


def _third(original: Pixels, protected: Pixels, heat: bool) -> tuple[Pixels, str, str]:
    """What tells of the change in a window, its label and its description."""
    if not heat:
        words = f"Difference, {AMPLIFICATION} times amplified"
        return difference(original, protected), f"difference × {AMPLIFICATION}", words
    from scol_ops.visibility import jod_map  # late: seconds that a report without faces need not take

    return heat_map(original, jod_map(original, protected)), "where it is seen", "Where the change is seen"


def _figures(
    rows: Sequence[Row], run: Run, budget: Budget, windows: bool = False, heat: bool = False
) -> tuple[list[FaceFigure], list[Row]]:
    """Figures of faces, and the faces that got none.

    Args:
        windows: in the photos' own pixels, where the photos can be read; else aligned crops.
        heat: the third picture of a window is a map of where the change is seen; else the difference.
    """
    figures, rest = [], []
    for start in range(0, len(rows), 16):
        chunk = rows[start : start + 16]
        pictures = read_pictures(run, [r["face_id"] for r in chunk], windows)
        for row in chunk:
            figure = _figure(row, pictures.get(row["face_id"]), budget, heat)
            figures.append(figure) if figure else rest.append(row)
    return figures, rest


def _by_jod(faces: Iterable[Row]) -> list[Row]:
    """The most visible change first; faces without JOD (of older runs) after the others, in the order given."""
    return sorted(faces, key=lambda r: (r["jod"] is None, r["jod"] if r["jod"] is not None else 0.0))


def _most_visible(faces: Sequence[Row], most: int) -> list[Row]:
    known = (r for r in faces if r["status"] in (OK, WEAK) and r["jod"] is not None and math.isfinite(r["jod"]))
    return _by_jod(known)[:most]


def _sample(faces: Sequence[Row], seed: int) -> list[Row]:
    """Well protected faces, in an order drawn by the run's seed."""
    def order(row: Row) -> bytes:
        return hashlib.blake2b(f"{seed}/{row['face_id']}".encode(), digest_size=8).digest()

    published = (r for r in faces if r["status"] == OK and r["psnr"] is not None)  # measured, so published
    return sorted(published, key=order)


def _weakest(faces: Sequence[Row]) -> list[Row]:
    return sorted((r for r in faces if r["status"] == WEAK),
                  key=lambda r: (-(r["ism"] if r["ism"] is not None else 2.0), r["face_id"]))


def _failures(rows: Iterable[Row]) -> list[tuple[str, str, str | None, list[tuple[str, str, str]]]]:
    """(code, stage, words of all, (who, words, "")), the most frequent first."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row in rows:
        code, _, words = (row["reason"] or "UNKNOWN").partition(":")
        groups.setdefault((code.strip(), row["failed_stage"] or "?"), []).append((_face_words(row), words.strip()))
    found = []
    for (code, stage), items in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0])):
        words, count = Counter(words for _, words in items).most_common(1)[0]
        shared = words if count > 1 and count == len(items) else None  # what all say is said once, at the top
        lines = [(who, words if shared is None else "", "") for who, words in sorted(items)]
        found.append((code, stage, shared, lines))
    return found


# ---- the page --------------------------------------------------------------------------------------------------------


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _settings(info: Row) -> list[tuple[str, bool, list[tuple[str, str]]]]:
    """(title, unfolded, (key, value)) of run.json's groups."""
    groups = {k: v for k, v in info.items() if isinstance(v, Mapping)}
    plain = {k: v for k, v in info.items() if k not in groups}
    titles = {"config": "configuration", "weights": "fingerprints of the weights, by stage",
              "stage_versions": "versions of the stages", "versions": "versions of the packages"}
    groups = {"run": plain} | groups
    found = [(titles.get(name, name), name != "config", list(_flat(group))) for name, group in groups.items()]
    return [group for group in found if group[2]]


def _read_json(run: Run, name: str) -> dict[str, Any]:
    try:
        return run.read_json(name)
    except RunError:
        return {}  # not finished, or damaged


def render(
    run: Run | str, sample: int = SAMPLE, weak: int = WEAK_SHOWN, picture_bytes: int = PICTURE_BYTES, seen: int = SEEN
) -> str:
    """The report as HTML text; see `write_report`."""
    run = as_run(run)
    info, totals = _read_json(run, "run.json"), summary(run)
    totals["seconds"] = _read_json(run, "summary.json").get("seconds")
    photos = read_photos(run).to_pylist()
    paths = {p["photo_id"]: p["path"] for p in photos}
    rows = read_stage(run, "publish", _FACE_COLUMNS).to_pylist()
    faces = [row | {"path": paths.get(row["photo_id"], row["path"])} for row in rows if row["face_id"] is not None]
    visible = _most_visible(faces, seen)
    good, weakest = _sample(faces, int(info.get("config", {}).get("seed", 0) or 0)), _weakest(faces)
    above = {r["face_id"] for r in visible}
    drawn = _by_jod([r for r in good if r["face_id"] not in above][:sample])
    # Every section's share of the room is set aside, so that many weak faces leave something to compare them with.
    counts = (len(visible), len(drawn), len(weakest[:weak]))
    shares = [Budget(picture_bytes * count // max(1, sum(counts))) for count in counts]
    most, more = _figures(visible, run, shares[0], windows=True, heat=True)
    shown, unshown = _figures(weakest[:weak], run, shares[2])
    return html.render(
        "report/run_page.html",
        url=run.url,
        t=totals,
        tiles=_tiles(totals),
        visible=most,
        visible_rest=[(_face_words(r), f"JOD {number(r['jod'], 2)}", r["reason"] or "") for r in more],
        good=len(good),
        sample=_figures(drawn, run, shares[1], windows=True)[0],
        weak=shown,
        weak_rest=[
            (_face_words(r), f"PSNR {number(r['psnr'], 1, 'dB')}, ISM {number(r['ism'], 3)}", r["reason"] or "")
            for r in [*unshown, *weakest[weak:]]
        ],
        charts=_histograms(faces, totals),
        times=_times(run, totals["stage_seconds"]),
        failures=_failures(errors(run.url, weak=False)),
        **{key: [(p["path"], "", "") for p in photos if p["status"] == key] for key in (NO_FACE, "pending")},
        settings=_settings(info),
    )


def write_report(run_url: Run | str, sample: int = SAMPLE, weak: int = WEAK_SHOWN) -> str:
    """Write `report.html` into a run's folder, from its manifests as they stand (finished or not).

    Args:
        run_url: the run's folder, a path or an fsspec URL.
        sample: most well protected faces shown, besides the most visible ones.
        weak: most weak faces shown with pictures; the rest are listed by name.

    Returns:
        URL of the file. Pictures take at most `PICTURE_BYTES`; names of failures are never cut.

    Raises:
        RunError: not a run's folder.
        StoreError: unreadable parts.
        OSError: the file cannot be written.
    """
    run = as_run(run_url)
    run.write("report.html", render(run, sample, weak).encode("utf-8"))
    return run.path("report.html")
