"""The report of a run: one HTML file without outside assets, made from the manifests.

What a photo's name or a reason says is untrusted text: it is escaped, control and direction characters are spelled
out, and a content security policy allows nothing but the page's own style, script and embedded pictures.  Style codes
do not appear in it: whoever has one has the face.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.report.charts import histogram_svg, number, ticks_between
from pipelines.report.html import document, escape, name_html
from pipelines.report.pictures import PICTURE_SIDE, Budget, data_url
from pipelines.report.run_faces import AMPLIFICATION, FacePictures, read_pictures
from pipelines.run.errors import errors
from pipelines.run.folder import Run, RunError
from pipelines.run.schemas import ERROR, NO_FACE, OK, WEAK
from pipelines.run.summary import summary
from pipelines.run.tables import read_photos, read_stage

SAMPLE = 24  # faces shown of those that are well protected
WEAK_SHOWN = 60  # weak faces shown with pictures; the rest by name
PICTURE_BYTES = 9_000_000  # most base64 characters of pictures in a report
_MEASURES = ("psnr", "ssim", "flip", "face_psnr", "ism", "ism_jpeg", "ism_worst")
_FACE_COLUMNS = ["photo_id", "face_id", "status", "reason", "path", "judge", "max_ism", *_MEASURES]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 120 else f"{hours:,.1f} h"


def _finite(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


def histogram(
    values: Iterable[float | None], title: str, axis: str, marks: Sequence[tuple[float, str]] = (), bins: int = 30
) -> str:
    """An inline SVG histogram with labelled axes, and a line of its statistics; values that are not finite are counted.

    Args:
        values: one a face; None is left out.
        title: heading, and start of the picture's description.
        axis: label of the x axis, with its unit.
        marks: (x, words): dashed lines.
        bins: about how many bars.
    """
    values = [v for v in values if v is not None and not math.isnan(v)]
    finite = _finite(values)
    if not finite:
        return f"<div><h3>{escape(title)}</h3><p class=soft>No face has this measure yet.</p></div>"
    low, high = min([*finite, *(m for m, _ in marks)]), max([*finite, *(m for m, _ in marks)])
    if high - low < 1e-6:
        pad = max(abs(low) * 0.05, 0.01)
        low, high = low - pad, high + pad
    ticks = ticks_between(low, high)
    low, high = ticks[0], ticks[-1]
    counts, edges = np.histogram(finite, bins=bins, range=(low, high))
    extra = len(values) - len(finite)
    words = (f"{len(finite):,} faces: mean {number(statistics.fmean(finite), 3)}, "
             f"median {number(statistics.median(finite), 3)}, "
             f"from {number(min(finite), 3)} to {number(max(finite), 3)}"
             + (f"; {extra:,} more without a finite value (unchanged faces)" if extra else ""))
    return histogram_svg(counts, edges, ticks, title, axis, words, marks)


@dataclass(frozen=True)
class _Data:
    """All that the page needs besides pictures."""

    run: Run
    info: dict[str, Any]
    totals: dict[str, Any]
    photos: list[dict[str, Any]]
    faces: list[dict[str, Any]]  # rows of publish with a face
    failures: list[dict[str, Any]]  # rows with status error, of faces and of photos, at any stage


def _collect(run: Run) -> _Data:
    try:
        info = run.read_json("run.json")
    except RunError:
        info = {}
    photos = read_photos(run).to_pylist()
    paths = {p["photo_id"]: p["path"] for p in photos}
    rows = read_stage(run, "publish", _FACE_COLUMNS).to_pylist()
    for row in rows:
        row["path"] = paths.get(row["photo_id"], row["path"])
    totals = summary(run)
    try:
        totals["seconds"] = run.read_json("summary.json").get("seconds")
    except RunError:
        pass  # not finished
    faces = [r for r in rows if r["face_id"] is not None]
    return _Data(run, info, totals, photos, faces, errors(run.url, weak=False))


def _face_words(row: Mapping[str, Any]) -> str:
    return f"{row['path']}, face {int(row['face_id'].rsplit('-', 1)[1]) + 1}" if row["face_id"] else row["path"]


def _banner(data: _Data) -> str:
    t = data.totals
    problems = []
    if not t["photos"]:
        problems.append("The run has no photos.")
    if t["pending"]:
        problems.append(f"<strong>This run is not finished:</strong> {t['pending']:,} of {t['photos']:,} photos have "
                        "not been published yet. The figures below speak of the rest; the same command goes on with "
                        "them.")
    if t[ERROR]:
        problems.append(f"{t[ERROR]:,} of {t['photos']:,} photos failed: <a href=\"#failures\">why</a>.")
    if t["face_status"][WEAK]:
        problems.append(f"{t['face_status'][WEAK]:,} faces are weakly protected: <a href=\"#weak\">which</a>.")
    kind = ERROR if t[ERROR] or t["pending"] or not t["photos"] else WEAK if problems else OK
    text = "".join(f"<p>{p}</p>" for p in problems) or "<p>All photos were done; no face failed and none is weak.</p>"
    return f'<div class="banner {kind}" role=status>{text}</div>'


def _strengthened_tiles(found: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    if found is None:
        return []
    words = f"{found['faces']:,} of {found['judged']:,}"
    mean = number(found["rounds"] / found["faces"], 1) if found["faces"] else "–"
    passed = f"{found['ended'].get('passed', 0):,} of {found['faces']:,}" if found["faces"] else "–"
    return [
        ("faces strengthened", words, ""),
        ("rounds of these, mean", mean, ""),
        ("of these now below the bar", passed, ""),
    ]


def _tiles(data: _Data) -> str:
    t = data.totals
    work = sum(t["stage_seconds"].values())
    weak = "–" if t["weak_share"] is None else f"{100 * t['weak_share']:.1f} %"
    tiles = [
        ("photos", f"{t['photos']:,}", ""),
        ("faces", f"{t['faces']:,}", ""),
        ("photos protected", f"{t[OK]:,}", OK if t[OK] else ""),
        ("photos weak", f"{t[WEAK]:,}", WEAK if t[WEAK] else ""),
        ("photos without a face", f"{t[NO_FACE]:,}", ""),
        ("photos failed", f"{t[ERROR]:,}", ERROR if t[ERROR] else ""),
        ("photos not reached", f"{t['pending']:,}", ERROR if t["pending"] else ""),
        ("faces weak", weak, WEAK if t["weak_share"] else ""),
        *_strengthened_tiles(t["strengthened"]),
        ("PSNR of the face crop, mean", number(t["psnr"], 2, "dB"), ""),
        ("SSIM of the face crop, mean", number(t["ssim"], 3), ""),
        ("FLIP, mean", number(t["flip"], 3), ""),
        ("ISM, mean", number(t["ism"], 3), ""),
        ("work a face, all stages", number(work / t["faces"], 1, "s")
         if t["faces"] and work and not t["pending"] else "–", ""),
    ]
    if t.get("seconds"):
        tiles.append(("wall time", _duration(t["seconds"]), ""))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd{f' class={kind}' if kind else ''}>{value}</dd></div>"
                    for name, value, kind in tiles)
    judge = ""
    if t["judge"]:
        limit = f" Weak above {number(t['max_ism'], 3)}." if t["max_ism"] is not None else ""
        judge = (f"<p class=soft>ISM: cosine of the features of the original and of the saved face by "
                 f"{name_html(t['judge'])}, which the method did not use; lower is better protected.{limit}</p>")
    return f"<dl class=tiles>{cells}</dl>{judge}"


def _card(row: Mapping[str, Any], pictures: FacePictures, budget: Budget) -> str | None:
    """A face's figure; None when the budget is used up or the face has no picture after."""
    difference = pictures.difference()
    if difference is None:
        return None
    urls = [data_url(p) for p in (pictures.original, pictures.protected, difference)]
    if not budget.take(urls):
        return None
    who = escape(_face_words(row))
    labels = [("before", f"Original: {who}"), ("after", f"Protected: {who}"),
              (f"difference × {AMPLIFICATION}", f"Difference, {AMPLIFICATION} times amplified: {who}")]
    images = "".join(
        f'<div><img loading=lazy decoding=async width={PICTURE_SIDE} height={PICTURE_SIDE} alt="{alt}" src="{url}">'
        f"<span>{label}</span></div>" for url, (label, alt) in zip(urls, labels, strict=True)
    )
    source = "" if pictures.saved else " (before saving: the saved file could not be read)"
    words = [f"PSNR {number(row['psnr'], 1, 'dB')}", f"SSIM {number(row['ssim'], 3)}",
             f"ISM {number(row['ism'], 3)}"]
    reason = f"<br><span class={escape(row['status'])}>{escape(row['reason'])}</span>" if row["reason"] else ""
    return (f"<li><figure><div class=triple>{images}</div><figcaption>{name_html(_face_words(row))}<br>"
            f"{' · '.join(words)}{source}{reason} <button type=button data-do=blink aria-pressed=false>blink</button>"
            f"</figcaption></figure></li>")


def _cards(rows: Sequence[Mapping[str, Any]], run: Run, budget: Budget) -> tuple[str, list[Mapping[str, Any]]]:
    """Figures of faces, and the faces that got none."""
    cards, rest = [], []
    for start in range(0, len(rows), 16):
        chunk = rows[start : start + 16]
        pictures = read_pictures(run, [r["face_id"] for r in chunk])
        for row in chunk:
            card = _card(row, pictures[row["face_id"]], budget) if row["face_id"] in pictures else None
            cards.append(card) if card else rest.append(row)
    return (f"<ul class=cards>{''.join(cards)}</ul>" if cards else ""), rest


def _order(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()


_PICTURES_NOTE = (
    f"Aligned crops, shown at {PICTURE_SIDE} px at most, of the original photo and of the saved file. Differences are "
    f"absolute and {AMPLIFICATION} times amplified: black is no change."
)


def _sample(data: _Data, budget: Budget, count: int) -> str:
    good = [r for r in data.faces if r["status"] == OK and r["psnr"] is not None]  # measured, so published
    if not good:
        return "<p class=soft>No face was protected well in this run.</p>"
    seed = int(data.info.get("config", {}).get("seed", 0) or 0)
    chosen = sorted(good, key=lambda r: _order(seed, r["face_id"]))[:count]
    cards, rest = _cards(chosen, data.run, budget)
    shown = len(chosen) - len(rest)
    return (f"<p class=soft>{shown:,} of {len(good):,} well protected faces, drawn by the run's seed. "
            f"{_PICTURES_NOTE}</p>{cards}")


def _names(rows: Iterable[str]) -> str:
    return f"<ul class=names>{''.join(f'<li>{row}</li>' for row in rows)}</ul>"


def _weak(data: _Data, budget: Budget, count: int) -> str:
    weak = sorted((r for r in data.faces if r["status"] == WEAK),
                  key=lambda r: (-(r["ism"] if r["ism"] is not None else 2.0), r["face_id"]))
    if not weak:
        return "<p>None.</p>"
    cards, unshown = _cards(weak[:count], data.run, budget)
    rest = [*unshown, *weak[count:]]
    text = f"<p class=soft>{len(weak):,} faces, the weakest first. {_PICTURES_NOTE}</p>{cards}"
    if rest:
        lines = (f"{name_html(_face_words(r))}: PSNR {number(r['psnr'], 1, 'dB')}, ISM {number(r['ism'], 3)}"
                 f" <span class=soft>{escape(r['reason'] or '')}</span>" for r in rest)
        text += f"<details><summary>{len(rest):,} more, by name</summary>{_names(lines)}</details>"
    return text


def _distributions(data: _Data) -> str:
    done = [r for r in data.faces if r["status"] in (OK, WEAK)]
    t = data.totals
    marks = [(t["max_ism"], f"weak above {number(t['max_ism'], 3)}")] if t["max_ism"] is not None else []
    judge = f" by {t['judge']}" if t["judge"] else ""
    charts = [
        histogram([r["psnr"] for r in done], "PSNR of the face crop", "PSNR, dB (higher: less visible)"),
        histogram([r["ism"] for r in done], f"ISM{judge}", "ISM, cosine (lower: better protected)", marks),
    ]
    if any(r["ism_jpeg"] is not None for r in done):
        charts.append(histogram([r["ism_jpeg"] for r in done], f"ISM{judge}, after JPEG 75 and half size",
                                "ISM, cosine (lower: better protected)", marks))
    if any(r["flip"] is not None for r in done):
        charts.append(histogram([r["flip"] for r in done], "FLIP", "FLIP, 0 to 1 (lower: less visible)"))
    return f"<div class=charts>{''.join(charts)}</div>"


def _times(data: _Data) -> str:
    rows, totals = [], {}
    for stage in data.totals["stage_seconds"]:
        seconds = _finite(read_stage(data.run, stage, ["seconds"])["seconds"].to_pylist())
        seconds = [s for s in seconds if s > 0]  # rows that were only carried through took no time
        totals[stage] = sum(seconds)
        rows.append((stage, seconds))
    whole = sum(totals.values())
    if not whole:
        return "<p class=soft>No stage has recorded time yet.</p>"
    body = "".join(
        f"<tr><th scope=row>{stage}</th><td class=n>{len(seconds):,}</td><td class=n>{_duration(totals[stage])}</td>"
        + (f"<td class=n>{statistics.fmean(seconds):.2f}</td><td class=n>{statistics.median(seconds):.2f}</td>"
           f"<td class=n>{np.percentile(seconds, 95):.2f}</td><td class=n>{max(seconds):.2f}</td>" if seconds
           else "<td class=n>–</td>" * 4)
        + f"<td class=n>{100 * totals[stage] / whole:.1f} %</td>"
        f'<td><svg viewBox="0 0 100 8" preserveAspectRatio=none aria-hidden=true>'
        f'<rect class=bar width="{100 * totals[stage] / whole:.2f}" height="8"/></svg></td></tr>'
        for stage, seconds in rows
    )
    return (
        "<p class=soft>Seconds that the workers spent, summed over all of them; reruns keep the time of the first run."
        "</p>"
        "<div class=wide tabindex=0 role=region aria-label=\"Time by stage\"><table><thead><tr><th scope=col>stage</th>"
        "<th scope=col class=n>rows</th><th scope=col class=n>total</th><th scope=col class=n>mean, s</th>"
        "<th scope=col class=n>median, s</th><th scope=col class=n>95 %, s</th><th scope=col class=n>most, s</th>"
        f"<th scope=col class=n>share</th><th scope=col><span class=soft>share</span></th></tr></thead><tbody>{body}"
        "</tbody></table></div>"
    )


def _failures(data: _Data) -> str:
    if not data.failures:
        return "<p>None.</p>"
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row in data.failures:
        code, _, words = (row["reason"] or "UNKNOWN").partition(":")
        groups.setdefault((code.strip(), row["failed_stage"] or "?"), []).append((_face_words(row), words.strip()))
    text = ("<div class=bar-actions><button type=button data-do=open>unfold all</button>"
            "<button type=button data-do=close>fold all</button></div>")
    for (code, stage), items in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0])):
        common = Counter(words for _, words in items).most_common(1)[0]
        # What nearly all say is said once, at the top.
        shared = common[0] if common[1] > 1 and common[1] == len(items) else None
        lines = (name_html(who) + (f": {escape(words)}" if words and shared is None else "")
                 for who, words in sorted(items))
        text += (f"<details{' open' if len(items) <= 20 else ''}><summary><strong class=error>{escape(code)}</strong>"
                 f" at {escape(stage)}: {len(items):,}{f' · {escape(shared)}' if shared else ''}</summary>"
                 f"{_names(lines)}</details>")
    return text


def _other_photos(data: _Data) -> str:
    def fold(status: str, title: str) -> str:
        names = [p["path"] for p in data.photos if p["status"] == status]
        if not names:
            return ""
        return f"<details><summary>{title}: {len(names):,}</summary>{_names(map(name_html, names))}</details>"

    text = fold(NO_FACE, "Photos without a face, copied as they are") + fold("pending", "Photos not reached yet")
    return text or "<p>None.</p>"


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _settings(data: _Data) -> str:
    if not data.info:
        return "<p class=error>run.json is missing or unreadable.</p>"
    text = ""
    groups = {k: v for k, v in data.info.items() if isinstance(v, Mapping)}
    plain = {k: v for k, v in data.info.items() if k not in groups}
    titles = {"config": "configuration", "weights": "fingerprints of the weights, by stage",
              "stage_versions": "versions of the stages", "versions": "versions of the packages"}
    for title, group in (("run", plain), *groups.items()):
        rows = list(_flat(group))
        if not rows:
            continue
        body = "".join(
            f"<tr><th scope=row><code>{escape(key)}</code></th><td><code>"
            f"{escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))}</code></td></tr>"
            for key, value in rows
        )
        text += (f"<details{' open' if title != 'config' else ''}><summary>{escape(titles.get(title, title))}"
                 f" ({len(rows)})</summary>"
                 f"<div class=wide><table><tbody>{body}</tbody></table></div></details>")
    return text


def render(run: Run | str, sample: int = SAMPLE, weak: int = WEAK_SHOWN, picture_bytes: int = PICTURE_BYTES) -> str:
    """The report as HTML text; see `write_report`."""
    run = run if isinstance(run, Run) else Run(str(run))
    data = _collect(run)
    # The sample's share of the room is set aside, so that many weak faces leave something to compare them with.
    total = max(1, sample + weak)
    sample_html = _sample(data, Budget(picture_bytes * sample // total), sample)
    weak_html = _weak(data, Budget(picture_bytes * weak // total), weak)
    sections = [
        ("totals", "Totals", _tiles(data)),
        ("faces", "Faces before and after", sample_html),
        ("weak", "Weak faces", weak_html),
        ("distributions", "Distributions", _distributions(data)),
        ("time", "Time by stage", _times(data)),
        ("failures", "Failures", _failures(data)),
        ("others", "Photos without a result", _other_photos(data)),
        ("settings", "Configuration, fingerprints, versions", _settings(data)),
    ]
    return document("scol: report of a run", "Report of a run", f"<p>{name_html(run.url)}</p>{_banner(data)}", sections,
                    "by scol from the run's manifests")


def write_report(run_url: Run | str, sample: int = SAMPLE, weak: int = WEAK_SHOWN) -> str:
    """Write `report.html` into a run's folder, from its manifests as they stand (finished or not).

    Args:
        run_url: the run's folder, a path or an fsspec URL.
        sample: most well protected faces shown.
        weak: most weak faces shown with pictures; the rest are listed by name.

    Returns:
        URL of the file. Pictures take at most `PICTURE_BYTES`; names of failures are never cut.

    Raises:
        RunError: not a run's folder.
        StoreError: unreadable parts.
        OSError: the file cannot be written.
    """
    run = run_url if isinstance(run_url, Run) else Run(str(run_url))
    run.write("report.html", render(run, sample, weak).encode("utf-8"))
    return run.path("report.html")
