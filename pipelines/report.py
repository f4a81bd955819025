"""The report of a run: one HTML file without outside assets, made from the manifests.

What a photo's name or a reason says is untrusted text: it is escaped, control and direction characters are spelled
out, and a content security policy allows nothing but the page's own style, script and embedded pictures.  Style codes
do not appear in it: whoever has one has the face.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import html
import io
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from pipelines.config import STAGES
from pipelines.inspect_run import errors
from pipelines.manifests import ERROR, NO_FACE, OK, WEAK, Run, RunError, read_photos, read_stage, summary
from pipelines.photo import MAX_BYTES, PhotoError, decode
from pipelines.sources import SourceError, read_bytes

AMPLIFICATION = 10
SAMPLE = 24  # faces shown of those that are well protected
WEAK_SHOWN = 60  # weak faces shown with pictures; the rest by name
PICTURE_SIDE = 256
PICTURE_BYTES = 9_000_000  # most base64 characters of pictures in a report

_MEASURES = ("psnr", "ssim", "flip", "face_psnr", "ism", "ism_jpeg")
_FACE_COLUMNS = ["photo_id", "face_id", "status", "reason", "path", "judge", "max_ism", *_MEASURES]

# Written out so that a name can neither hide a part of itself nor reverse the line that it stands in.
_SPELLED = {c: f"\\u{c:04x}" for c in (*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F),
                                       *range(0x2066, 0x206A), 0xFEFF, *range(0xD800, 0xE000))}

Pixels = NDArray[np.uint8]


def escape(text: object) -> str:
    """Untrusted text as HTML, for content and for quoted attributes: escaped, invisible characters spelled out."""
    return html.escape(str(text).translate(_SPELLED), quote=True)


def _name(text: object) -> str:
    return f'<bdi class="name">{escape(text)}</bdi>'


# ---- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FacePictures:
    """A face's aligned crop before and after, uint8 (S, S, 3) RGB.

    Attributes:
        original: as it was aligned.
        protected: None where the run has none yet.
        saved: `protected` was cut out of the saved file; otherwise it is as the last stage left it.
    """

    original: Pixels
    protected: Pixels | None
    saved: bool = False

    def difference(self, amplification: float = AMPLIFICATION) -> Pixels | None:
        """|protected - original| times `amplification`, clipped at 255: black where nothing changed."""
        if self.protected is None or self.protected.shape != self.original.shape:
            return None
        change = np.abs(self.protected.astype(np.int16) - self.original)
        return np.clip(change * amplification, 0, 255).astype(np.uint8)


def _decode(data: bytes | None) -> Pixels | None:
    if data is None:
        return None
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # a report leaves a picture out rather than fail


def read_crops(run: Run | str, face_ids: Iterable[str], stage: str, column: str) -> dict[str, Pixels]:
    """Pictures of some faces from a stage's table, uint8 (S, S, 3); faces that have none there are left out.

    Raises:
        RunError, StoreError: see `manifests.read_stage`.
    """
    return {face: pixels for face, row in _face_rows(run, face_ids, stage, [column]).items()
            if (pixels := _decode(row[column])) is not None}


def _face_rows(
    run: Run | str, face_ids: Iterable[str], stage: str, columns: Sequence[str]
) -> dict[str, dict[str, Any]]:
    run = run if isinstance(run, Run) else Run(str(run))
    wanted = set(face_ids)
    if not wanted:
        return {}
    photo_ids = {face.rsplit("-", 1)[0] for face in wanted}
    plan = run.plan()
    chosen = plan.filter(pa.array([p in photo_ids for p in plan["photo_id"].to_pylist()], pa.bool_()))
    rows = run.store.read_rows(stage, chosen[stage].to_pylist(), ["face_id", *columns])
    return {row["face_id"]: row for row in rows.to_pylist() if row["face_id"] in wanted} if rows.num_rows else {}


def read_pictures(run: Run | str, face_ids: Iterable[str]) -> dict[str, FacePictures]:
    """Before and after of some faces: the original from the manifests, the protected one from the saved file.

    Where the saved file cannot be read (moved, another machine) the picture after is the one that the last stage left
    in the manifests.

    Raises:
        RunError, StoreError: see `manifests.read_stage`.
    """
    face_ids = list(face_ids)
    aligned = _face_rows(run, face_ids, "align", ["crop", "quad", "width", "height"])
    published = _face_rows(run, face_ids, "publish", ["action", "out_path"])
    made: dict[str, Pixels] | None = None
    out: dict[str, FacePictures] = {}
    last: tuple[str, Any] = ("", None)  # faces of one photo come one after the other
    for face in face_ids:
        row, done = aligned.get(face), published.get(face)
        original = _decode(row["crop"]) if row else None
        if original is None:
            continue
        cut = None
        if done and done["action"] == "protected" and done["out_path"] and row["quad"] is not None:
            if last[0] != done["out_path"]:
                last = (done["out_path"], _read_photo(done["out_path"]))
            cut = _cut(last[1], row, len(original))
        if cut is None:
            made = read_crops(run, face_ids, "attack", "protected") if made is None else made
            out[face] = FacePictures(original, made.get(face))
        else:
            out[face] = FacePictures(original, cut, saved=True)
    return out


def _read_photo(url: str) -> Pixels | None:
    try:
        return decode(read_bytes(url, 2 * MAX_BYTES)).pixels
    except (SourceError, PhotoError):
        return None


def _cut(photo: Pixels | None, row: Mapping[str, Any], size: int) -> Pixels | None:
    """The aligned crop of a face in a saved photo, cut as the verdict's is."""
    if photo is None or photo.shape[:2] != (row["height"], row["width"]):
        return None
    import torch  # late: seconds that a report without faces need not take

    from scol_ops.alignment import align_crops
    from scol_ops.metrics import to_uint8
    from scol_ops.warp import GeometryError

    quad = torch.tensor(row["quad"], dtype=torch.float64).reshape(1, 4, 2)
    try:
        return to_uint8(align_crops(photo, quad, size)[0])
    except GeometryError:
        return None


def _data_url(pixels: Pixels) -> str:
    image = Image.fromarray(pixels)
    if max(image.size) > PICTURE_SIDE:
        image = image.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BOX, reducing_gap=None)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90, subsampling="4:4:4", optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


class _Budget:
    """Counts the pictures' characters; says no when they are used up."""

    def __init__(self, characters: int) -> None:
        self.left = characters

    def take(self, urls: Sequence[str]) -> bool:
        size = sum(map(len, urls))
        if size > self.left:
            return False
        self.left -= size
        return True


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 2, unit: str = "") -> str:
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" + (f" {unit}" if unit else "")
    return f"{value:,.{digits}f}".replace("-", "−") + (f" {unit}" if unit else "")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 120 else f"{hours:,.1f} h"


def _finite(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


def _ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers that cover a range: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


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
    ticks = _ticks(low, high)
    low, high = ticks[0], ticks[-1]
    counts, edges = np.histogram(finite, bins=bins, range=(low, high))
    left, right, top, bottom, width, height = 58, 14, 16, 46, 520, 260
    inner_w, inner_h = width - left - right, height - top - bottom
    y_ticks = [t for t in _ticks(0, max(int(counts.max()), 1), 5) if float(t).is_integer()]
    y_max = y_ticks[-1]

    def px(x: float) -> float:
        return left + inner_w * (x - low) / (high - low)

    def py(y: float) -> float:
        return top + inner_h * (1 - y / y_max)

    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    parts = []
    for t in y_ticks:
        parts.append(f'<line class=grid x1="{left}" x2="{width - right}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>'
                     f'<text x="{left - 6}" y="{py(t) + 4:.1f}" text-anchor=end>{t:,.0f}</text>')
    for t in ticks:
        parts.append(f'<line class=axis x1="{px(t):.1f}" x2="{px(t):.1f}" y1="{py(0)}" y2="{py(0) + 5}"/>'
                     f'<text x="{px(t):.1f}" y="{py(0) + 18}" text-anchor=middle>{_number(t, digits)}</text>')
    for count, x0, x1 in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            parts.append(
                f'<rect class=bar x="{px(x0) + 0.5:.1f}" y="{py(count):.1f}" width="{px(x1) - px(x0) - 1:.1f}" '
                f'height="{py(0) - py(count):.1f}"><title>{_number(x0, digits + 1)} to {_number(x1, digits + 1)}: '
                f"{count:,}</title></rect>"
            )
    parts.append(f'<line class=axis x1="{left}" x2="{width - right}" y1="{py(0)}" y2="{py(0)}"/>')
    for x, words in marks:
        side = "end" if px(x) > left + inner_w / 2 else "start"
        parts.append(f'<line class=mark x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{top}" y2="{py(0)}"/>'
                     f'<text class=marked x="{px(x) + (-6 if side == "end" else 6):.1f}" y="{top + 10}" '
                     f"text-anchor={side}>{escape(words)}</text>")
    parts.append(f'<text x="{left + inner_w / 2}" y="{height - 8}" text-anchor=middle>{escape(axis)}</text>'
                 f'<text x="14" y="{top + inner_h / 2}" text-anchor=middle '
                 f'transform="rotate(-90 14 {top + inner_h / 2})">faces</text>')
    extra = len(values) - len(finite)
    words = (f"{len(finite):,} faces: mean {_number(statistics.fmean(finite), 3)}, "
             f"median {_number(statistics.median(finite), 3)}, "
             f"from {_number(min(finite), 3)} to {_number(max(finite), 3)}"
             + (f"; {extra:,} more without a finite value (unchanged faces)" if extra else ""))
    return (f"<div><h3>{escape(title)}</h3>"
            f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{escape(f"Histogram. {title}. {words}")}">'
            f"{''.join(parts)}</svg><p class=soft>{escape(words)}.</p></div>")


# ---- the page's parts ------------------------------------------------------------------------------------------------


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


def _tiles(data: _Data) -> str:
    t = data.totals
    work = sum(t["stage_seconds"].values())
    tiles = [
        ("photos", f"{t['photos']:,}", ""),
        ("faces", f"{t['faces']:,}", ""),
        ("photos protected", f"{t[OK]:,}", OK if t[OK] else ""),
        ("photos weak", f"{t[WEAK]:,}", WEAK if t[WEAK] else ""),
        ("photos without a face", f"{t[NO_FACE]:,}", ""),
        ("photos failed", f"{t[ERROR]:,}", ERROR if t[ERROR] else ""),
        ("photos not reached", f"{t['pending']:,}", ERROR if t["pending"] else ""),
        ("PSNR of the face crop, mean", _number(t["psnr"], 2, "dB"), ""),
        ("SSIM of the face crop, mean", _number(t["ssim"], 3), ""),
        ("FLIP, mean", _number(t["flip"], 3), ""),
        ("ISM, mean", _number(t["ism"], 3), ""),
        ("work a face, all stages", _number(work / t["faces"], 1, "s")
         if t["faces"] and work and not t["pending"] else "–", ""),
    ]
    if t.get("seconds"):
        tiles.append(("wall time", _duration(t["seconds"]), ""))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd{f' class={kind}' if kind else ''}>{value}</dd></div>"
                    for name, value, kind in tiles)
    judge = ""
    if t["judge"]:
        limit = f" Weak above {_number(t['max_ism'], 3)}." if t["max_ism"] is not None else ""
        judge = (f"<p class=soft>ISM: cosine of the features of the original and of the saved face by "
                 f"{_name(t['judge'])}, which the method did not use; lower is better protected.{limit}</p>")
    return f"<dl class=tiles>{cells}</dl>{judge}"


def _card(row: Mapping[str, Any], pictures: FacePictures, budget: _Budget) -> str | None:
    """A face's figure; None when the budget is used up or the face has no picture after."""
    difference = pictures.difference()
    if difference is None:
        return None
    urls = [_data_url(p) for p in (pictures.original, pictures.protected, difference)]
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
    words = [f"PSNR {_number(row['psnr'], 1, 'dB')}", f"SSIM {_number(row['ssim'], 3)}",
             f"ISM {_number(row['ism'], 3)}"]
    reason = f"<br><span class={escape(row['status'])}>{escape(row['reason'])}</span>" if row["reason"] else ""
    return (f"<li><figure><div class=triple>{images}</div><figcaption>{_name(_face_words(row))}<br>"
            f"{' · '.join(words)}{source}{reason} <button type=button data-do=blink aria-pressed=false>blink</button>"
            f"</figcaption></figure></li>")


def _cards(rows: Sequence[Mapping[str, Any]], run: Run, budget: _Budget) -> tuple[str, list[Mapping[str, Any]]]:
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


def _sample(data: _Data, budget: _Budget, count: int) -> str:
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


def _weak(data: _Data, budget: _Budget, count: int) -> str:
    weak = sorted((r for r in data.faces if r["status"] == WEAK),
                  key=lambda r: (-(r["ism"] if r["ism"] is not None else 2.0), r["face_id"]))
    if not weak:
        return "<p>None.</p>"
    cards, unshown = _cards(weak[:count], data.run, budget)
    rest = [*unshown, *weak[count:]]
    text = f"<p class=soft>{len(weak):,} faces, the weakest first. {_PICTURES_NOTE}</p>{cards}"
    if rest:
        lines = (f"{_name(_face_words(r))}: PSNR {_number(r['psnr'], 1, 'dB')}, ISM {_number(r['ism'], 3)}"
                 f" <span class=soft>{escape(r['reason'] or '')}</span>" for r in rest)
        text += f"<details><summary>{len(rest):,} more, by name</summary>{_names(lines)}</details>"
    return text


def _distributions(data: _Data) -> str:
    done = [r for r in data.faces if r["status"] in (OK, WEAK)]
    t = data.totals
    marks = [(t["max_ism"], f"weak above {_number(t['max_ism'], 3)}")] if t["max_ism"] is not None else []
    judge = f" by {t['judge']}" if t["judge"] else ""
    charts = [
        histogram([r["psnr"] for r in done], "PSNR of the face crop", "PSNR, dB (higher: less visible)"),
        histogram([r["ism"] for r in done], f"ISM{judge}", "ISM, cosine (lower: better protected)", marks),
    ]
    if any(r["ism_jpeg"] is not None for r in done):
        charts.append(histogram([r["ism_jpeg"] for r in done], f"ISM{judge}, after half size and JPEG 75",
                                "ISM, cosine (lower: better protected)", marks))
    if any(r["flip"] is not None for r in done):
        charts.append(histogram([r["flip"] for r in done], "FLIP", "FLIP, 0 to 1 (lower: less visible)"))
    return f"<div class=charts>{''.join(charts)}</div>"


def _times(data: _Data) -> str:
    rows, totals = [], {}
    for stage in STAGES:
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
        lines = (_name(who) + (f": {escape(words)}" if words and shared is None else "")
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
        return f"<details><summary>{title}: {len(names):,}</summary>{_names(map(_name, names))}</details>"

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


# ---- the page --------------------------------------------------------------------------------------------------------


def _asset(name: str) -> str:
    return resources.files("pipelines").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def render(run: Run | str, sample: int = SAMPLE, weak: int = WEAK_SHOWN, picture_bytes: int = PICTURE_BYTES) -> str:
    """The report as HTML text; see `write_report`."""
    run = run if isinstance(run, Run) else Run(str(run))
    data = _collect(run)
    # The sample's share of the room is set aside, so that many weak faces leave something to compare them with.
    total = max(1, sample + weak)
    sample_html = _sample(data, _Budget(picture_bytes * sample // total), sample)
    weak_html = _weak(data, _Budget(picture_bytes * weak // total), weak)
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
    style, script = _asset("report.css"), _asset("report.js")
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    nav = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in sections)
    body = "".join(f'<section aria-labelledby="{key}"><h2 id="{key}">{title}</h2>{content}</section>'
                   for key, title, content in sections)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>scol: report of a run</title><style>{style}</style></head><body>"
        '<a class=skip href="#totals">Skip to the totals</a>'
        f"<header><h1>Report of a run</h1><p>{_name(run.url)}</p>{_banner(data)}"
        f'<nav aria-label="Sections"><ul>{nav}</ul></nav></header><main>{body}</main>'
        f"<footer>Written {now} by scol from the run's manifests.</footer><script>{script}</script></body></html>\n"
    )


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
