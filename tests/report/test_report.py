"""The report: parsed as HTML, and opened in a real browser where there is one."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.config.names import STAGES
from pipelines.report import html, pictures, run_faces, run_page
from pipelines.report.charts import Histogram, Tile
from pipelines.report.pictures import FaceFigure, Picture
from pipelines.report.windows import LARGEST, window_of
from pipelines.run.folder import Run, RunError
from pipelines.run.schemas import PLAN_SCHEMA, SCHEMAS, SOURCE
from pipelines.run.tables import read_stage
from scol_ops.visibility import face_window
from tests.helpers.browser import CHROMIUM, FLAGS, Browser

NASTY = '<img src=x onerror="document.title=1">&\'"\u202egpj.exe\n.jpg'
VOID = {"meta", "img", "br", "link", "input", "hr"}


def png(seed: int, side: int = 64) -> bytes:
    return _png(seed % 97, side)


@functools.cache
def _png(seed: int, side: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (4, 4, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def photo(path, *faces, reason=None, stage=None, upto="publish"):
    """A photo of a made-up run: `faces` are status words; none: no face, or an error where there is a reason."""
    return {"path": path, "faces": faces, "reason": reason, "stage": stage, "upto": upto}


def make_run(folder: Path, photos: list[dict], run_json: bool = True) -> Run:
    run = Run(str(folder))
    rows = {stage: [] for stage in STAGES}
    plan = []
    for i, item in enumerate(photos):
        photo_id = f"{i:016x}"
        keys = {stage: f"{i:030x}{n:02x}" for n, stage in enumerate((SOURCE, *STAGES))}
        plan.append({"photo_id": photo_id, "path": item["path"], **keys})
        for stage in STAGES[: STAGES.index(item["upto"]) + 1] if item["upto"] else ():
            faces = list(enumerate(item["faces"])) or [(None, "error" if item["reason"] else "no_face")]
            for number, status in faces:
                done = status in ("ok", "weak")
                row = {name: None for name in SCHEMAS[stage].names}
                row |= {"key": keys[stage], "photo_id": photo_id, "status": status, "seconds": 0.5 if done else 0.0,
                        "face_id": None if number is None else f"{photo_id}-{number:02d}", "seed": 1, "weights": "ab"}
                if status == "error":
                    row |= {"reason": item["reason"] or "EXCEPTION: it broke", "failed_stage": item["stage"] or "tune"}
                if status == "weak":
                    row["reason"] = "ISM: too similar"
                    row["status"] = "weak" if stage == "publish" else "ok"
                if done:
                    code = [0.123456] * 8192 if i < 50 else None
                    value = {"align": {"crop": png(i)}, "invert": {"code": code},
                             "fuse": {"fused": code, "target": code},
                             "attack": {"protected": png(i + 1000)},
                             "strengthen": {"protected": png(i + 2000) if i % 2 else None, "rounds": i % 3,
                                            "share": 1 - i % 3 / 4,
                                            "ended": "passed" if i % 3 < 2 else "rounds"},
                             "publish": {"path": item["path"], "out_path": item["path"], "action": "protected",
                                         "psnr": 30 + i % 7 / 2, "ssim": 0.95, "flip": 0.1, "face_psnr": 28.0,
                                         "face_ssim": 0.94, "jod": 9.0 + i % 10 / 10, "jod_4k": 9.5,
                                         "judge": "faceres", "max_ism": 0.545,
                                         "ism": 0.3 + i % 5 / 50 + (0.4 if status == "weak" else 0)}}
                    row |= value.get(stage, {})
                rows[stage].append(row)
    run.write_plan(pa.Table.from_pylist(plan, PLAN_SCHEMA))
    for stage, items in rows.items():
        if items:
            run.store.write_part(stage, None, pa.Table.from_pylist(items, SCHEMAS[stage]))
    if run_json:
        run.write_json("run.json", {"config": {"seed": 3, "tune": {"steps": 40}}, "fingerprints": {"encoder": "c0ffee"},
                                    "versions": {"torch": "2.14.1"}, "out": "/somewhere/<b>"})
    return run


class Page(HTMLParser):
    """Everything that a test asks about: tags balanced, attributes, text by section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.sections, self.text, self.ids = [], [], {}, "", []
        self.heading = None
        self.feed(text)
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if "id" in dict(attrs):
            self.ids.append(dict(attrs)["id"])
            if tag == "h2":
                self.heading = dict(attrs)["id"]

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            return
        self.text += data
        if self.heading:
            self.sections[self.heading] = self.sections.get(self.heading, "") + data

    def all(self, tag):
        return [attributes for t, attributes in self.tags if t == tag]


SPELLED = NASTY.replace("\u202e", "\\u202e").replace("\n", "\\u000a")
HIDDEN = {chr(c) for c in (*range(10), *range(11, 32), *range(0x7F, 0xA0), 0x200E, 0x200F, 0x202E, 0x2066, 0xFEFF)}


def harmless(text: str) -> Page:
    """A page or a part of one in which `NASTY` is text only."""
    page = Page(text)
    assert not HIDDEN & set(text) and "<img src=x" not in text
    assert not any(n.startswith("on") for _, attributes in page.tags for n in attributes)
    assert len(page.all("script")) <= 1 and not any(image.get("src") == "x" for image in page.all("img"))
    assert not {"b", "i"} & {tag for tag, _ in page.tags}
    return page


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> tuple[Run, str]:
    photos = [photo(f"a/{i:03d}.jpg", "ok") for i in range(40)]
    photos += [photo(f"weak/{i:03d}.jpg", "ok", "weak") for i in range(5)]
    photos += [photo(f"broken/{i}.jpg", reason="TRUNCATED: the file ends too early", stage="align") for i in range(30)]
    photos += [photo("slow.jpg", "ok", "error", reason="TIMEOUT: more than 5 s"), photo("empty.png"),
               photo(NASTY, reason="CORRUPT: <script>alert(1)</script>", stage="align")]
    run = make_run(tmp_path_factory.mktemp("mixed"), photos)
    url = run_page.write_report(run.url)
    assert url == run.path("report.html")
    return run, Path(url).read_text(encoding="utf-8")


def test_no_outside_reference(mixed):
    page = Page(mixed[1])
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("data:image/", "#")), (tag, name, value[:80])
        assert not any(n.startswith("on") for n in attributes), attributes
        assert "style" not in attributes  # the content security policy would drop it
    assert not re.search(r"@import|url\(|https?://", mixed[1])
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {t for t, _ in page.tags}
    assert {a["href"][1:] for a in page.all("a")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_counts_and_banner(mixed):
    page = Page(mixed[1])
    tiles = dict(re.findall(r"<dt>([^<]+)</dt><dd[^>]*>([^<]+)</dd>", mixed[1]))
    assert (tiles["photos"], tiles["faces"]) == ("78", "52")
    assert (tiles["photos protected"], tiles["photos weak"], tiles["photos failed"]) == ("40", "5", "32")
    assert tiles["photos without a face"] == "1" and tiles["photos not reached"] == "0"
    assert 9 < float(tiles["JOD of the face window, mean"]) < 10 and tiles["SSIM of the face, mean"] == "0.940"
    assert 9 <= float(tiles["JOD, 5 % of the faces below"]) < float(tiles["JOD of the face window, mean"])
    # 51 faces have a verdict, 5 of them weak; the made-up loop sent two of three back
    judged = [row for row in read_stage(mixed[0], "strengthen").to_pylist() if row["status"] == "ok"]
    again = [row["rounds"] for row in judged if row["rounds"]]
    assert tiles["faces strengthened"] == f"{len(again)} of {len(judged)}" and tiles["faces weak"] == "9.8 %"
    assert tiles["rounds of these, mean"] == f"{sum(again) / len(again):.1f}"
    passed = sum(row["ended"] == "passed" for row in judged)
    assert 0 < passed < len(judged) and tiles["hidden, and not seen too much"] == f"{passed} of {len(judged)}"
    shares = [row["share"] for row in judged]
    assert tiles["share of a change kept, mean"] == f"{sum(shares) / len(shares):.2f}"
    assert tiles["faces with less than all of it"] == f"{sum(share < 1 for share in shares)} of {len(judged)}"
    assert "32 of 78 photos failed" in page.text and "5 faces are weakly protected" in page.text
    assert "not finished" not in page.text
    assert "empty.png" in page.sections["others"]


def test_failures_are_all_there_by_reason_and_escaped(mixed):
    page = Page(mixed[1])
    text = page.sections["failures"]
    assert "TRUNCATED at align: 30" in text and "TIMEOUT at tune: 1" in text and "CORRUPT at align: 1" in text
    assert all(f"broken/{i}.jpg" in text for i in range(30))
    assert "slow.jpg, face 2" in text
    # As text, with what is invisible spelled out; never as markup.
    assert '<img src=x onerror="document.title=1">&\'"\\u202egpj.exe\\u000a.jpg' in text
    assert "<script>alert(1)</script>" in text
    assert len(page.all("script")) == 1 and not any(i.get("src") == "x" for i in page.all("img"))


def test_faces_have_three_described_pictures(mixed):
    page = Page(mixed[1])
    images = page.all("img")
    assert len(images) == 3 * (run_page.SEEN + run_page.SAMPLE + 5)
    assert all(i["loading"] == "lazy" and i["alt"].split(":")[0] in
               ("Original", "Protected", "Difference, 10 times amplified") for i in images)
    assert page.text.count("difference × 10") == run_page.SEEN + run_page.SAMPLE + 5
    assert all(f"weak/{i:03d}.jpg, face 2" in page.sections["weak"] for i in range(5))


def test_settings_but_no_code(mixed):
    page = Page(mixed[1])
    assert all(word in page.sections["settings"] for word in ("tune.steps", "c0ffee", "2.14.1", "/somewhere/<b>"))
    assert "0.1234" not in mixed[1]


def test_a_hostile_name_is_text_wherever_it_stands(tmp_path):
    """As the run's folder, a photo with a picture, one by name only, a failure, its code and stage, a photo without a
    face, one not reached, a reason, the judge, a setting's key and its value."""
    photos = [photo(f"ok{NASTY}", "ok"), photo(f"weak{NASTY}", "weak"), photo(f"rest{NASTY}", "weak"),
              photo(f"failed{NASTY}", reason=f"<b>{NASTY}: {NASTY}", stage=f"<i>{NASTY}"), photo(f"empty{NASTY}"),
              photo(f"later{NASTY}", "ok", upto="tune")]
    run = make_run(tmp_path / NASTY, photos)
    rows = run.store.read_rows("publish").to_pylist()
    for part in run.store.parts("publish"):
        Path(run.store.path("publish", part)).unlink()
    rows = [row | {"judge": NASTY, "reason": row["reason"] and f"{row['reason']} {NASTY}"} for row in rows]
    run.store.write_part("publish", None, pa.Table.from_pylist(rows, SCHEMAS["publish"]))
    run.write_json("run.json", {"config": {"seed": 3, NASTY: {NASTY: NASTY}}, NASTY: NASTY, f"group{NASTY}": {"a": 1}})
    text = run_page.render(run, weak=1)
    page = harmless(text)
    assert len(page.all("img")) == 12 and all(SPELLED in image["alt"] for image in page.all("img"))
    assert sum(SPELLED in attributes.get("aria-label", "") for attributes in page.all("svg")) == 1  # the judge's
    assert page.text.count(SPELLED) == sum(page.sections[key].count(SPELLED) for key in page.sections) + 1
    sections = {key: words.count(SPELLED) for key, words in page.sections.items()}
    assert sections == {"totals": 1, "seen": 5, "faces": 0, "weak": 4, "distributions": 1, "time": 0, "failures": 5,
                        "others": 2, "settings": 6}, sections
    assert text.count('<bdi class="name">') == 10


@pytest.mark.parametrize("macro, value", [
    ("name", NASTY),
    ("tiles", [Tile(NASTY, NASTY, NASTY, NASTY)]),
    ("table", [(NASTY, NASTY), (NASTY, NASTY)]),
    ("names", [(NASTY, NASTY, NASTY)]),
    ("cards", [FaceFigure(NASTY, NASTY, (Picture(NASTY, NASTY, NASTY),), NASTY, NASTY)]),
    ("cards", [FaceFigure(NASTY, NASTY, (Picture(NASTY, NASTY, NASTY, 5, 6),), NASTY, NASTY)]),
    ("histogram", Histogram.of([1], [0, 1], [0, 1], NASTY, NASTY, NASTY, [(0.5, NASTY)])),
])  # fmt: skip
def test_every_part_escapes_every_value(macro, value):
    text = html.part(macro, value)
    harmless(text)
    assert text.count("document.title=1") == str(value).count("document.title=1") + (macro == "histogram") * 2


def test_a_template_cannot_turn_escaping_off():
    for name in ("safe", "e", "escape", "forceescape", "tojson", "urlize", "xmlattr"):
        with pytest.raises(jinja2.TemplateAssertionError, match=f"No filter named '{name}'"):
            html._environment().from_string(f"{{{{ x | {name} }}}}")
    assert html._environment().from_string("{{ x }}").render(x="a\u2066\ud800<") == "a\\u2066\\ud800&lt;"
    with pytest.raises(jinja2.UndefinedError):
        html._environment().from_string("{{ y }}").render(x=1)
    pipelines = Path(html.__file__).parents[1]
    made = [file.name for file in pipelines.rglob("*.py") if "Markup(" in file.read_text()]
    assert made == ["html.py"]  # nothing else says that some text is markup
    templates = {str(file.relative_to(pipelines)) for file in pipelines.rglob("*.html")}
    assert templates >= {"report/base.html", "report/run_page.html", "evaluate/page.html"}
    assert all(html._environment().get_template(name) for name in templates)
    assert not any("autoescape" in (pipelines / name).read_text() for name in templates)


def test_the_policy_allows_the_pages_own_style_and_script(mixed):
    page = Page(mixed[1])
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for kind, rule in (("style", "style-src"), ("script", "script-src")):
        own = re.search(f"<{kind}>(.*?)</{kind}>", mixed[1], re.S).group(1)
        assert rules.pop(rule) == f"'sha256-{base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()}'"
    assert rules == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'"}


def test_difference_is_amplified_and_clipped():
    before = np.full((2, 2, 3), 100, np.uint8)
    after = before.copy()
    after[0, 0], after[0, 1] = 97, 255
    difference = run_faces.FacePictures(before, after).difference()
    assert difference[0, 0].tolist() == [30] * 3 and difference[0, 1].tolist() == [255] * 3
    assert difference[1].max() == 0
    assert run_faces.FacePictures(before, None).difference() is None


def test_sample_is_seeded(mixed):
    def names(text):
        return re.findall(r'alt="Original: ([^"]+)"', text)

    first = names(mixed[1])
    assert names(run_page.render(mixed[0])) == first
    other = dict(mixed[0].read_json("run.json"))
    other["config"] = other["config"] | {"seed": 4}
    original = mixed[0].read("run.json")
    mixed[0].write_json("run.json", other)
    try:
        assert names(run_page.render(mixed[0])) != first
    finally:
        mixed[0].write("run.json", original)


def test_picture_budget_lists_the_rest_by_name(tmp_path):
    run = make_run(tmp_path, [photo(f"{i}.jpg", "weak") for i in range(12)])
    text = run_page.render(run, sample=0, weak=10, picture_bytes=60_000, seen=0)
    page = Page(text)
    shown = len(page.all("img")) // 3
    assert 0 < shown < 10
    assert sum(len(i["src"]) for i in page.all("img")) <= 60_000
    assert f"{12 - shown} more, by name" in page.sections["weak"]
    assert all(f"{i}.jpg" in page.sections["weak"] for i in range(12))


@pytest.mark.parametrize("name, photos, words", [
    ("no photos", [], "The run has no photos"),
    ("no faces", [photo("a.png"), photo("b.png")], "All photos were done"),
    ("all failed", [photo("a.png", reason="EMPTY: no bytes", stage="align")], "1 of 1 photos failed"),
    ("nothing yet", [photo("a.png", "ok", upto=None)], "1 of 1 photos have not been published"),
    ("half way", [photo("a.png", "ok"), photo("b.png", "ok", upto="tune")], "1 of 2 photos have not been published"),
])  # fmt: skip
def test_other_runs(tmp_path, name, photos, words):
    page = Page(run_page.render(make_run(tmp_path, photos, run_json=name != "nothing yet")))
    assert words in page.text
    if name in ("nothing yet", "half way"):
        assert "This run is not finished" in page.text
        assert photos[-1]["path"] in page.sections["others"]
    if name != "half way":
        assert not page.all("img")


def test_not_a_run(tmp_path):
    with pytest.raises(RunError, match="no run"):
        run_page.write_report(str(tmp_path))


def test_unreadable_crop_is_left_out(tmp_path):
    run = make_run(tmp_path, [photo("a.png", "ok")])
    table = run.store.read_rows("align")
    key = table["key"][0].as_py()
    broken = table.set_column(table.schema.get_field_index("crop"), SCHEMAS["align"].field("crop"), [[b"no png"]])
    for part in run.store.parts("align"):
        Path(run.store.path("align", part)).unlink()
    run.store.write_part("align", None, broken)
    assert run_faces.read_pictures(run, [f"{0:016x}-00"]) == {}
    assert not Page(run_page.render(run)).all("img") and key


def test_pictures_come_from_the_saved_file(tmp_path):
    """The crop after is what the saved file holds; where that is gone, what the last stage left."""
    run = make_run(tmp_path / "run", [photo("a.png", "ok")])
    before = np.asarray(Image.open(io.BytesIO(png(5, 300))))
    after = before.copy()
    after[120:150, 120:150] = np.clip(after[120:150, 120:150].astype(int) + 7, 0, 255)
    saved = tmp_path / "a.png"
    Image.fromarray(after).save(saved)
    low, high = 99.5, 163.5  # 64 x 64 px at 1:1, so that the crop's pixels are the photo's
    geometry = {"quad": [low, low, low, high, high, high, high, low], "box": [110.0, 105.0, 150.0, 160.0],
                "landmarks": [120.0, 125, 140, 125, 130, 135, 122, 145, 138, 145], "width": 300, "height": 300}
    crop = io.BytesIO()
    Image.fromarray(before[100:164, 100:164]).save(crop, "PNG")
    changed = {"align": geometry | {"crop": crop.getvalue()}, "publish": {"out_path": str(saved)}}
    for stage, values in changed.items():
        rows = [row | values for row in run.store.read_rows(stage).to_pylist()]
        for part in run.store.parts(stage):
            Path(run.store.path(stage, part)).unlink()
        run.store.write_part(stage, None, pa.Table.from_pylist(rows, SCHEMAS[stage]))
    name = f"{0:016x}-00"
    pictures = run_faces.read_pictures(run, [name])[name]
    assert pictures.saved and np.array_equal(pictures.protected, after[100:164, 100:164])
    difference = pictures.difference()
    assert difference[21:49, 21:49].max() == 70 and difference[:19].max() == 0
    assert "could not be read" not in run_page.render(run)
    saved.unlink()
    pictures = run_faces.read_pictures(run, [name])[name]
    assert not pictures.saved and np.array_equal(pictures.protected, np.asarray(Image.open(io.BytesIO(png(1000)))))
    assert "the saved file could not be read" in run_page.render(run)


def change_rows(run: Run, stage: str, change) -> None:
    """Write a stage's rows anew, each with what `change` makes of it."""
    rows = [row | change(row) for row in run.store.read_rows(stage).to_pylist()]
    for part in run.store.parts(stage):
        Path(run.store.path(stage, part)).unlink()
    run.store.write_part(stage, None, pa.Table.from_pylist(rows, SCHEMAS[stage]))


def seen_run(folder: Path, jods: list[float | None], side: int = 300) -> tuple[Run, list[np.ndarray], list[np.ndarray]]:
    """A run whose photos are there: the smaller a photo's JOD the more is changed; with originals and saved photos."""
    run = make_run(folder / "run", [photo(f"{i}.png", "ok") for i in range(len(jods))])
    originals, saved, urls = [], [], {}
    for i, value in enumerate(jods):
        before = np.asarray(Image.open(io.BytesIO(png(i, side))))
        after = before.copy()
        after[140:160, 140:160] = np.clip(after[140:160, 140:160].astype(int) + int(80 - 8 * (value or 5)), 0, 255)
        for name, pixels in (("in", before), ("out", after)):
            urls[name, f"{i:016x}"] = str(folder / f"{name}{i}.png")
            Image.fromarray(pixels).save(folder / f"{name}{i}.png")
        originals.append(before)
        saved.append(after)
    quad = [100.0, 100, 100, 200, 200, 200, 200, 100]
    change_rows(run, "align", lambda r: {"quad": quad, "width": side, "height": side})
    change_rows(run, "publish", lambda r: {"jod": jods[int(r["photo_id"], 16)], "out_path": urls["out", r["photo_id"]]})
    source = [{"key": f"{i:030x}00", "photo_id": f"{i:016x}", "path": f"{i}.png", "url": urls["in", f"{i:016x}"],
               "status": "ok"} for i in range(len(jods))]  # fmt: skip
    run.store.write_part(SOURCE, None, pa.Table.from_pylist(source, SCHEMAS[SOURCE]))
    return run, originals, saved


def test_the_most_visible_stand_first_in_the_photos_own_pixels(tmp_path):
    jods = [9.5, 7.0, None, 8.0, 9.9, None]
    run, originals, saved = seen_run(tmp_path, jods)
    text = run_page.render(run, seen=3)
    page = Page(text)
    shown = [(i["alt"].split(": ")[0], i["alt"].split(": ")[1], i) for i in page.all("img")]
    who = [name for what, name, _ in shown if what == "Original"]
    assert who[:3] == ["1.png, face 1", "3.png, face 1", "0.png, face 1"]  # by JOD
    assert who[3] == "4.png, face 1" and set(who[4:]) == {"2.png, face 1", "5.png, face 1"}  # a drawn one; without JOD
    assert [what for what, *_ in shown[:9]] == ["Original", "Protected", "Where the change is seen"] * 3
    assert [what for what, *_ in shown[9:]] == ["Original", "Protected", "Difference, 10 times amplified"] * 3
    left, top, right, bottom = face_window([100.0, 100, 100, 200, 200, 200, 200, 100], 300, 300)
    for what, name, image in shown:
        kind, data = image["src"].split(";base64,")
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert kind == "data:image/png" and pixels.shape == (int(image["height"]), int(image["width"]), 3)
        photos = {"Original": originals, "Protected": saved}.get(what)
        if photos:
            assert np.array_equal(pixels, photos[int(name[0])][top:bottom, left:right])
        elif what == "Where the change is seen":
            colour = (pixels.max(2).astype(int) - pixels.min(2))
            assert colour[20:40, 20:40].mean() > 2 * colour[:8, :8].mean() and colour.max() > 40  # at the change
    assert "3 faces of the lowest JOD" in page.sections["seen"] and "JOD 7.00" in page.sections["seen"]
    assert "JOD –" in page.sections["faces"] and text.count("data-do=zoom") == 6
    assert page.all("svg")[0]["class"] == "scale" and "4 JOD and more" in page.all("svg")[0]["aria-label"]
    # A budget that is used up leaves names.
    page = Page(run_page.render(run, seen=3, picture_bytes=30_000))
    assert "more, by name" in page.sections["seen"] and "1.png" in page.sections["seen"]


def test_photos_that_have_gone_or_changed_leave_crops(tmp_path):
    run, _, _ = seen_run(tmp_path, [8.0, 9.0, 9.5])
    change_rows(run, "align", lambda r: {"content": "0" * 32} if r["photo_id"][-1] == "1" else {})
    (tmp_path / "in0.png").unlink()
    ids = [f"{i:016x}-00" for i in range(3)]
    found = run_faces.read_pictures(run, ids, windows=True)
    assert [found[i].windows is None for i in ids] == [True, True, False]
    assert all(p.windows is None for p in run_faces.read_pictures(run, ids).values())
    page = Page(run_page.render(run))
    assert sum(i.get("class") == "own" for i in page.all("img")) == 3 and len(page.all("img")) == 9


def test_windows_are_bounded():
    quad = np.array([[0, 0], [0, 2000], [2000, 2000], [2000, 0]]) + 500.0
    left, top, right, bottom = window_of(quad, 3000, 3000)
    assert LARGEST - 2 <= right - left <= LARGEST and abs((left + right) / 2 - 1500) <= 1
    assert window_of(quad / 20, 150, 150) == face_window(quad / 20, 150, 150)
    with pytest.raises(ValueError):
        window_of(quad, 100, 100)
    with pytest.raises(ValueError):
        window_of([float("nan")] * 8, 100, 100)
    large = np.zeros((300, 300, 3), np.uint8)
    assert pictures.window_url(large).startswith("data:image/jpeg")
    assert pictures.window_url(large[:256, :256]).startswith("data:image/png")


def test_heat_colours():
    original = np.full((2, 3, 3), 90, np.uint8)
    lost = np.array([[0, 0.5, 1], [2, 4, 40]], np.float32)
    got = pictures.heat_map(original, lost)
    assert got.dtype == np.uint8 and got[0, 0].tolist() == [90] * 3 and np.array_equal(got[1, 1], got[1, 2])
    colours, opacity = pictures.heat_colours(np.linspace(0, 1, 50, dtype=np.float32))
    assert np.all(np.diff(colours @ [0.299, 0.587, 0.114]) < 0) and np.all(np.diff(opacity[:, 0]) >= 0)
    scale = pictures.heat_scale()
    assert scale[0] == (0.0, "rgb(128,128,128)") and scale[-1][0] == pictures.HEAT_TOP


def test_of_a_strengthened_face_the_last_picture_is_that_one(tmp_path):
    run = make_run(tmp_path, [photo("a.png", "ok"), photo("b.png", "ok")])
    last = [run_faces.read_pictures(run, [f"{i:016x}-00"])[f"{i:016x}-00"].protected for i in (0, 1)]
    for pixels, number in zip(last, (1000, 2001), strict=True):
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(png(number)))))


def test_histogram():
    def drawn(*arguments) -> str:
        return html.part("histogram", run_page.histogram(*arguments))

    svg = drawn([30.0, 31.0, 31.2, 35.0, float("inf"), None], "PSNR", "PSNR, dB", [(33.0, "limit <")])
    page = Page(svg)
    counts = [int(re.search(r": (\d+)$", t).group(1)) for t in re.findall(r"<title>([^<]+)</title>", svg)]
    assert sum(counts) == 4 == len(page.all("rect")) + 4 - len(counts)
    assert "PSNR, dB" in page.text and "faces" in page.text and "limit <" in page.text
    assert "mean 31.800" in page.text and "1 more without a finite value" in page.text
    assert page.all("svg")[0]["aria-label"].startswith("Histogram. PSNR.")
    assert "No face has this measure" in drawn([None], "a", "b")
    assert Page(drawn([0.5, 0.5], "all equal", "x")).all("rect")


# ---- in a browser ----------------------------------------------------------------------------------------------------

def browse(tmp_path: Path, url: str, *options: str) -> str:
    done = subprocess.run([CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=5000",
                           "--enable-logging=stderr", "--v=0", *options, url],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    # The policy's violations and the script's errors are reported on the console.
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
def test_in_chromium(tmp_path):
    """Three thousand faces, a hundred of them weak: the page loads, its script runs, its pictures decode."""
    photos = [photo(f"folder/{i:04d}.jpg", "ok") for i in range(2900)]
    photos += [photo(f"w{i}.jpg", "weak") for i in range(100)]
    photos.append(photo(NASTY, reason="CORRUPT: <b>", stage="align"))
    run = make_run(tmp_path / "run", photos)
    url = run_page.write_report(run)
    assert Path(url).stat().st_size < 15_000_000
    dom = browse(tmp_path, Path(url).as_uri(), "--dump-dom")
    page = Page(dom)
    assert len(page.all("img")) == 3 * (run_page.SEEN + run_page.SAMPLE + run_page.WEAK_SHOWN)
    assert "40 more, by name" in page.text
    assert "<title>scol: report of a run</title>" in dom  # the nasty name has not run
    shot = tmp_path / "shot.png"
    browse(tmp_path, Path(url).as_uri(), f"--screenshot={shot}", "--window-size=1200,1600")
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"), np.float32)
    assert pixels.shape[:2] == (1600, 1200)
    # The pictures are there: a large share of the lower half is neither paper nor ink.
    colourful = (pixels.max(2) - pixels.min(2)) > 40
    assert colourful[800:].mean() > 0.1


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
def test_blinking_in_place_in_chromium(tmp_path):
    """The protected window gives place to the original and comes back; zoom is by whole pixels, whatever the screen."""
    run, _, _ = seen_run(tmp_path, [8.0, 9.0])
    url = Path(run_page.write_report(run)).as_uri()
    with Browser(tmp_path, ratio=1.5) as browser:
        browser.open(url)
        picture = "document.querySelectorAll('.look img')"
        sources = browser.js(f"[...{picture}].slice(0, 2).map((i) => i.src)")
        now = f"{picture}[1].src"
        browser.click(".look ~ figcaption [data-do=blink]")
        for wanted in (sources[0], sources[1], sources[0]):
            browser.wait(f"{now} === {wanted!r}", 5)
        assert browser.js("document.querySelector('.look ~ figcaption [data-do=blink]').ariaPressed") == "true"
        browser.click(".look ~ figcaption [data-do=blink]")
        assert browser.js(now) == sources[1]
        browser.click(".look ~ figcaption [data-do=original]")
        assert browser.js(now) == sources[0] and browser.js(f"{picture}[1].nextSibling.textContent") == "original"
        browser.click(".look ~ figcaption [data-do=original]")
        assert browser.js(f"{picture}[1].alt").startswith("Protected")
        side = browser.js(f"{picture}[0].naturalWidth")
        for zoom in (1, 2, 3, 1):
            width = browser.js(f"{picture}[0].getBoundingClientRect().width * devicePixelRatio")
            assert width == pytest.approx(side * zoom, abs=0.1)
            browser.click(".look ~ figcaption [data-do=zoom]")
        assert not browser.errors, browser.errors
