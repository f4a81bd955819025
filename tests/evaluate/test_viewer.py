"""The page for viewers: what is drawn, what it does not tell, how answers are read; answered in a real browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from pipelines.cli.main import main
from pipelines.evaluate import answers, viewer
from pipelines.evaluate.errors import EvaluateError
from pipelines.evaluate.statistics import wilson
from pipelines.evaluate.viewer import BOTH, LEFT, RIGHT, Draw
from pipelines.report import html
from pipelines.report.windows import LARGEST, window_of
from pipelines.run.folder import Run
from scol_ops.alignment import ffhq_quads
from tests.helpers.browser import CHROMIUM, Browser

LANDMARKS = np.array([[80, 80], [120, 80], [100, 105], [85, 125], [115, 125]], np.float32)
SIDE = 200


def picture(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8))
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def save(path: Path, pixels: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return str(path)


def row(folder: Path, i: int, protected: np.ndarray | None, **changes) -> dict:
    one = save(folder / f"originals/secretname{i}.png", picture(i))
    two = save(folder / f"protected/secretname{i}.png", picture(i) if protected is None else protected)
    return {"face_id": f"{i:016x}-00", "person_id": f"person{i // 2}", "status": "ok", "same_size": True,
            "same_bytes": False, "url": one, "protected_url": two,
            "landmarks": LANDMARKS.reshape(-1).tolist()} | changes  # fmt: skip


def altered(i: int) -> np.ndarray:
    return np.clip(picture(i).astype(int) + 40 * (i % 2) - 20, 0, 255).astype(np.uint8)


@pytest.fixture
def run(tmp_path) -> Run:
    """An evaluation of 24 changed faces, and of faces that cannot be shown."""
    rows = [row(tmp_path, i, altered(i)) for i in range(24)]
    rows += [row(tmp_path, 24, None), row(tmp_path, 25, altered(25), same_size=False),
             row(tmp_path, 26, altered(26), status="error"), row(tmp_path, 27, altered(27), url="/gone.png"),
             row(tmp_path, 28, altered(28), same_bytes=True)]  # fmt: skip
    out = Run(str(tmp_path / "out"))
    schema = pa.schema([pa.field(n, pa.string()) for n in ("face_id", "person_id", "status", "url", "protected_url")]
                       + [pa.field(n, pa.bool_()) for n in ("same_size", "same_bytes")]
                       + [pa.field("landmarks", pa.list_(pa.float32(), 10))])  # fmt: skip
    out.write_table("faces.parquet", pa.Table.from_pylist(rows, schema))
    out.write_json("evaluation.json", {"counts": {"photos": 29}})
    page = html.render("evaluate/viewers.html", viewers=None, rows=[], each=[])
    out.write("evaluation.html", f"<h1>before</h1><!--viewers-->{page}<!--/viewers--><p>after</p>".encode())
    return out


def pictures(page: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By pair: what stands left and right."""
    found = {}
    for name, width, height, url in re.findall(
        r'data-id="(\w+)" data-width="(\d+)" data-height="(\d+)" data-picture="data:image/png;base64,([^"]+)"', page
    ):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(url))))
        assert pixels.shape == (int(height), 2 * int(width), 3)
        found[name] = pixels[:, : int(width)], pixels[:, int(width) :]
    return found


def reply(key: dict, **changes) -> dict:
    """As of a viewer who always sees the original."""
    told = {
        p["id"]: {"original": "unsure", "score": 5, "publish": None}
        if p["original"] == BOTH
        else {"original": p["original"], "score": 2, "publish": False}
        for p in key["pairs"]
    }
    return {"version": 1, "page": key["page"], "session": "a1", "viewer": "Anna", "answers": told} | changes


def put(folder: Path, name: str, value: object) -> str:
    file = folder / name
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(file)


# ---- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, unaltered", [(1, 0.25), (2, 0.25), (7, 0.0), (40, 0.25), (40, 0.9), (199, 0.3)])
def test_places_are_balanced(count, unaltered):
    places = viewer.arrange(count, unaltered, 3)
    left, right, both = (places.count(p) for p in (LEFT, RIGHT, BOTH))
    assert left + right + both == count and abs(left - right) <= 1
    assert both == (0 if count == 1 or not unaltered else max(1, round(unaltered * count)))
    assert places == viewer.arrange(count, unaltered, 3)
    if count >= 40:
        assert places != viewer.arrange(count, unaltered, 4)
        assert places[: count // 2] != sorted(places[: count // 2])  # mixed


def test_an_odd_pair_goes_to_either_side():
    assert {viewer.arrange(1, 0, seed)[0] for seed in range(20)} == {LEFT, RIGHT}


@pytest.mark.parametrize("pairs, unaltered", [(0, 0.2), (201, 0.2), (3, -0.1), (3, 1.0), (3, float("nan"))])
def test_draws_that_cannot_be(pairs, unaltered):
    with pytest.raises(EvaluateError, match="BAD_SETTING"):
        Draw(pairs, unaltered)


def window(landmarks: np.ndarray = LANDMARKS, side: int = SIDE) -> tuple[int, int, int, int]:
    quad = ffhq_quads(torch.from_numpy(landmarks.astype(np.float64))[None])[0].numpy()
    return window_of(quad, side, side, viewer.WINDOW)


def test_the_window_is_the_middle_of_the_crop_in_whole_pixels():
    left, top, right, bottom = window()
    assert abs(right - left - bottom + top) <= 1 and all(isinstance(v, int) for v in (left, top, right, bottom))
    assert left < 75 and right > 125 and top < 75 and bottom > 130  # the face is in it
    moved = window(LANDMARKS - [75, 0])
    assert moved[0] == 0 and moved[2] < right - 60  # cut at the photo's edge
    with pytest.raises(ValueError, match="outside the photo"):
        window(LANDMARKS + [5000, 0])
    huge = window(LANDMARKS * 20, 20 * SIDE)
    assert all(LARGEST - 2 <= side <= LARGEST for side in (huge[2] - huge[0], huge[3] - huge[1]))


def test_the_page_shows_the_photos_own_pixels(run):
    said = []
    key = viewer.write_viewer(run, Draw(20, 0.25), 0, said.append)
    assert said == ["page for viewers: 20 pairs, 5 of them unaltered"] and run.read_json("viewer-key.json") == key
    shown = pictures(run.read("viewer.html").decode())
    assert list(shown) == [p["id"] for p in key["pairs"]] and len(shown) == 20
    for pair in key["pairs"]:
        i = int(pair["face_id"][:16], 16)
        left, top, right, bottom = window()
        one, two = (p[top:bottom, left:right] for p in (picture(i), altered(i)))
        expected = {LEFT: (one, two), RIGHT: (two, one), BOTH: (one, one)}[pair["original"]]
        assert all(np.array_equal(a, b) for a, b in zip(shown[pair["id"]], expected, strict=True))


def test_the_page_does_not_tell_which_is_which(run):
    key = viewer.write_viewer(run, Draw(20, 0.25), 0)
    page = run.read("viewer.html").decode()
    assert not any(word in page for word in ("secretname", "person0", "person1", "protected", run.url))
    assert not any(p["face_id"] in page or p["face_id"][:16] in page for p in key["pairs"])
    assert "http" not in page.replace("http-equiv", "") and page.count("<script>") == 1
    # Each pair is one picture of one encoding: the attributes are the same for all, and no chunk but the needed ones.
    for url in re.findall(r'data-picture="data:image/png;base64,([^"]+)"', page):
        data = base64.b64decode(url)
        kinds, at = [], 8
        while at < len(data):
            kinds.append(data[at + 4 : at + 8])
            at += 12 + int.from_bytes(data[at : at + 4])
        assert set(kinds) == {b"IHDR", b"IDAT", b"IEND"}
    own = re.search("<script>(.*?)</script>", page, re.S).group(1)
    assert base64.b64encode(hashlib.sha256(own.encode()).digest()).decode() in page.split("script-src")[1][:80]


def test_drawing_is_seeded(run):
    def drawn(seed: int, **changes) -> tuple[dict, bytes]:
        key = viewer.write_viewer(run, Draw(12, 0.25, **changes), seed)
        return {k: v for k, v in key.items() if k != "written"}, run.read("viewer.html")

    assert drawn(0) == drawn(0)
    one, two = drawn(0)[0], drawn(1)[0]
    assert one["page"] != two["page"] and [p["face_id"] for p in one["pairs"]] != [p["face_id"] for p in two["pairs"]]


def test_few_faces_and_none(run, tmp_path):
    key = viewer.write_viewer(run, Draw(200, 0.25), 0)
    assert len(key["pairs"]) == 24  # those that can be shown
    empty = run.read_table("faces.parquet").slice(24)
    run.write_table("faces.parquet", empty)
    with pytest.raises(EvaluateError, match="NO_FACES"):
        viewer.write_viewer(run, Draw(), 0)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_answers_are_added_up(run, tmp_path):
    key = viewer.write_viewer(run, Draw(20, 0.25), 0)
    anna = put(tmp_path, "anna.json", reply(key))
    ben = reply(key, session="b2", viewer=" <b>Ben</b> ")
    for i, p in enumerate(key["pairs"]):  # sees nothing, and twice something where nothing is
        ben["answers"][p["id"]] = {"original": "unsure", "score": 4, "publish": True}
        if p["original"] == BOTH and i % 2:
            ben["answers"][p["id"]]["original"] = LEFT
    accused = sum(p["original"] == BOTH and i % 2 for i, p in enumerate(key["pairs"]))
    got = answers.record_answers(run.url, [anna, put(tmp_path, "ben.json", ben)])
    one, two = got["altered"], got["unaltered"]
    assert (got["viewers"], one["pairs"], two["pairs"], one["answers"], two["answers"]) == (2, 15, 5, 30, 10)
    assert (one["right"], one["wrong"], one["unsure"], two["accused"]) == (15, 0, 15, accused)
    assert one["picked"] == wilson(22.5, 30) and one["picked_of_decided"] == wilson(15, 15)
    assert one["differ"] == wilson(15, 30) and two["differ"] == wilson(accused, 10)
    assert one["score"]["value"] == 3 and one["score"]["low"] <= 3 <= one["score"]["high"]
    assert two["score"]["value"] == 4.5 and one["publish"]["value"] == 0.5 and one["publish"]["n"] == 30
    assert two["publish"]["value"] == 1 and two["publish"]["n"] == 5  # Anna did not say
    assert [v["viewer"] for v in got["by_viewer"]] == ["Anna", "<b>Ben</b>"]
    assert got["by_viewer"][0]["altered"]["picked"]["value"] == 1
    stored = run.read_json("evaluation.json")
    assert stored["viewers"] == json.loads(json.dumps(got)) and stored["counts"] == {"photos": 29}
    page = run.read("evaluation.html").decode()
    assert page.startswith("<h1>before</h1><!--viewers-->") and page.endswith("<!--/viewers--><p>after</p>")
    assert "75.0 [" in page and "&lt;b&gt;Ben" in page and "<b>" not in page and "Nobody was asked" not in page
    # What is read later takes its place.
    assert answers.record_answers(run.url, [anna])["viewers"] == 1
    assert "Ben" not in run.read("evaluation.html").decode()


def test_an_evaluation_keeps_what_viewers_said_until_a_photo_changes(run, tmp_path):
    said = []
    assert answers.carried(run) is None
    key = viewer.write_viewer(run, Draw(10, 0.25), 0)
    assert answers.carried(run) is None
    got = answers.record_answers(run.url, [put(tmp_path, "anna.json", reply(key))])
    assert answers.carried(run, said.append) == json.loads(json.dumps(got)) and not said
    file = Path(key["pairs"][0]["protected_url"])
    file.write_bytes(file.read_bytes() + b" ")
    assert answers.carried(run, said.append) is None and "have changed" in said[0]


@pytest.mark.parametrize("change, words", [
    ("not json", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[]", "no answers of viewer.html"),
    ({"answers": []}, "no answers of viewer.html"),
    ({"version": 2}, "version 2 of the answers"),
    ({"version": "<b>\n"}, "version '<b>\\\\n'"),
    ({"page": "0123"}, "answers to another page"),
    ({"page": None}, "answers to another page"),
    ({"session": ""}, "session and viewer"),
    ({"viewer": 5}, "session and viewer"),
    ({"answers": {}}, "no pair is answered"),
    ({"answers": {"feed\n": {}}}, "unknown pair 'feed"),
    ({"one": "left"}, "no answer"),
    ({"one": {"original": "both", "score": 3}}, "original is 'both'"),
    ({"one": {"original": ["left"], "score": 3}}, "original is"),
    ({"one": {"original": "left", "score": 0}}, "score is 0"),
    ({"one": {"original": "left", "score": 6}}, "score is 6"),
    ({"one": {"original": "left", "score": 3.0}}, "score is 3.0"),
    ({"one": {"original": "left", "score": True}}, "score is True"),
    ({"one": {"original": "left"}}, "score is None"),
    ({"one": {"original": "left", "score": 3, "publish": "yes"}}, "publish is 'yes'"),
    (" " * 1_000_001, "cannot be read: TOO_LARGE"),
    (None, "cannot be read: NOT_FOUND"),
])  # fmt: skip
def test_bad_answers_are_one_line(run, tmp_path, change, words):
    key = viewer.write_viewer(run, Draw(4, 0.25), 0)
    before = run.read("evaluation.json")
    if isinstance(change, dict):
        told = reply(key)
        one = change.pop("one", None)
        if one is not None:
            told["answers"][key["pairs"][0]["id"]] = one
        change = told | change
    file = str(tmp_path / "x.json") if change is None else put(tmp_path, "x.json", change)
    with pytest.raises(EvaluateError, match="BAD_ANSWERS: .*x.json: (pair [0-9a-f]+: )?" + words) as caught:
        answers.record_answers(run.url, [file])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(file)
    assert run.read("evaluation.json") == before


def test_other_trouble(run, tmp_path):
    with pytest.raises(EvaluateError, match="NO_VIEWER_PAGE"):
        answers.record_answers(run.url, [str(tmp_path / "x.json")])
    key = viewer.write_viewer(run, Draw(4, 0.25), 0)
    one = put(tmp_path, "viewer-answers-1.json", reply(key))
    with pytest.raises(EvaluateError, match="of one sitting"):
        answers.record_answers(run.url, [one, put(tmp_path, "viewer-answers-2.json", reply(key))])
    put(tmp_path, "viewer-answers-2.json", reply(key, session="b2"))
    put(tmp_path, "notes.json", "no answers")
    assert answers.record_answers(run.url, [str(tmp_path), one])["viewers"] == 2  # a folder, and a file of it again
    with pytest.raises(EvaluateError, match="has no viewer-answers"):
        answers.record_answers(run.url, [str(tmp_path / "originals")])
    older = viewer.write_viewer(run, Draw(4, 0.25), 5)
    assert older["page"] != key["page"]
    with pytest.raises(EvaluateError, match="answers to another page"):
        answers.record_answers(run.url, [one])
    for broken in ("{}", "[]", "{", '{"version": 1, "page": "a", "pairs": [{"id": "a", "original": "up"}]}'):
        run.write("viewer-key.json", broken.encode())
        with pytest.raises(EvaluateError, match="NO_VIEWER_PAGE"):
            answers.record_answers(run.url, [one])


def test_the_command_reads_answers_without_measuring(run, tmp_path):
    key = viewer.write_viewer(run, Draw(8, 0.25), 0)
    file = put(tmp_path, "anna.json", reply(key))
    command = ["evaluate", "/not/there", "/neither", "--out", run.url, "--viewer-answers"]
    got = CliRunner().invoke(main, [*command, file])
    assert got.exit_code == 0 and "1 viewers" in got.output and "BT.500" in got.output, got.output
    got = CliRunner().invoke(main, [*command, file, "--json"])
    assert json.loads(got.output)["altered"]["right"] == 6
    got = CliRunner().invoke(main, [*command, put(tmp_path, "bad.json", "{")])
    assert got.exit_code == 2 and got.output.count("\n") == 1 and "error: BAD_ANSWERS" in got.output
    assert CliRunner().invoke(main, [*command, file, "--viewer"]).exit_code == 2


def test_wilson():
    assert wilson(0, 0) is None
    got = wilson(8, 10)  # Newcombe, Statistics in Medicine 17, 1998, gives such: 0.490 to 0.943
    assert (got["value"], got["n"]) == (0.8, 10)
    assert (got["low"], got["high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 5)["low"] == pytest.approx(0, abs=1e-12) and wilson(5, 5)["high"] == pytest.approx(1)


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
def test_answered_in_chromium(run, tmp_path):
    """By keyboard and mouse, with a way back; the canvases hold the photo's own pixels at 100 % and 200 %."""
    key = viewer.write_viewer(run, Draw(8, 0.25), 0)
    shown = pictures(run.read("viewer.html").decode())
    alone = tmp_path / "sent/viewer.html"  # as a viewer has it: without anything beside it
    alone.parent.mkdir()
    alone.write_bytes(run.read("viewer.html"))
    read = """(id) => { const c = document.querySelector(id + ' canvas');
        return [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]; }"""

    def canvas(browser: Browser, name: str) -> np.ndarray:
        width, height, values = browser.js(f"({read})('#{name}')")
        return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]

    with Browser(tmp_path) as browser:
        browser.open(alone.as_uri())
        browser.click("#viewer")
        for letter in "Ann L":
            browser.key(letter)
        browser.key("Enter")
        for number, pair in enumerate(key["pairs"]):
            browser.wait(f"document.getElementById('where').textContent === 'Pair {number + 1} of 8'")
            browser.wait(f"document.getElementById('stage').dataset.pair === '{pair['id']}'")
            if number == 0:
                first(browser, canvas, *shown[pair["id"]])
            original = "u" if pair["original"] == BOTH else pair["original"][0]
            if number % 2:
                browser.click(f"input[value={ {'u': 'unsure', 'l': 'left', 'r': 'right'}[original] }]")
                browser.click(f"input[name=score][value='{2 + number % 3}']")
                browser.click("button[type=submit]")
            else:
                for letter in (original, str(2 + number % 3), "n"):
                    browser.key(letter)
                browser.key("Enter")
        browser.wait("!document.getElementById('end').hidden")
        assert "8 of 8 pairs answered" in browser.js("document.getElementById('counts').textContent")
        browser.click("[data-do=download]")
        file = browser.downloaded()
        assert file.name == "viewer-answers-Ann-L.json"
        text = browser.js("document.getElementById('text').value")
        assert json.loads(file.read_text())["answers"] == json.loads(text)["answers"]
        # Whoever comes back goes on; the next person at the same computer starts anew.
        browser.open(alone.as_uri() + "#again")
        browser.call("Page.reload")
        browser.wait("document.readyState === 'complete' && !document.getElementById('kept').hidden")
        assert "8 answers of Ann L" in browser.js("document.getElementById('kept').textContent")
        browser.click("[data-do=anew]")
        browser.click("[data-do=begin]")
        browser.wait("document.getElementById('where').textContent === 'Pair 1 of 8'")
        assert browser.js("document.getElementById('progress').value") == 0
        assert not browser.errors, browser.errors
    got = answers.record_answers(run.url, [str(file)])
    assert (got["altered"]["right"], got["altered"]["answers"], got["unaltered"]["accused"]) == (6, 6, 0)
    scores = [2 + i % 3 for i, p in enumerate(key["pairs"]) if p["original"] != BOTH]
    assert got["altered"]["score"]["value"] == pytest.approx(np.mean(scores))
    assert got["by_viewer"][0]["viewer"] == "Ann L"


def first(browser: Browser, canvas, left: np.ndarray, right: np.ndarray) -> None:
    """What can be done with a pair, before it is answered."""
    assert np.array_equal(canvas(browser, "one"), left) and np.array_equal(canvas(browser, "two"), right)
    browser.key("Enter")
    assert "first two questions" in browser.js("document.getElementById('said').textContent")
    browser.key("t")
    assert browser.js("document.getElementById('one').hidden") and np.array_equal(canvas(browser, "place"), left)
    browser.key("t")
    assert np.array_equal(canvas(browser, "place"), right)
    browser.click("[data-do=zoom]")
    assert np.array_equal(canvas(browser, "place"), right.repeat(2, 0).repeat(2, 1))
    browser.key("z")
    browser.key("f")
    caption = "document.querySelector('#place figcaption').textContent"
    for side in ("left", "right"):
        browser.wait(f"{caption} === '{side}'", 5)
    browser.key("s")
    assert not browser.js("document.getElementById('two').hidden")
    # Forward with an answer, back, and it is still there.
    for letter in ("l", "1", "Enter"):
        browser.key(letter)
    browser.wait("document.getElementById('where').textContent === 'Pair 2 of 8'")
    browser.key("b")
    browser.wait("document.getElementById('where').textContent === 'Pair 1 of 8'")
    assert browser.js("new FormData(document.getElementById('form')).get('score')") == "1"
