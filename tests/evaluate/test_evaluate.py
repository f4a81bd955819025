"""The whole job on a tree of generated people, where the right answers are known."""

from __future__ import annotations

import html
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from pipelines.archive.paths import OutputError
from pipelines.cli.main import main
from pipelines.evaluate import job, judges, measure
from pipelines.evaluate.answers import Answers, viewer_figures
from pipelines.evaluate.errors import EvaluateError
from pipelines.evaluate.measure import Eyes, Gallery, Measurer, Settings, Spot, Window, column
from pipelines.evaluate.page import Example, write_page
from pipelines.evaluate.statistics import Distribution
from pipelines.evaluate.summary import Judge, Summary
from pipelines.evaluate.viewer import Draw
from pipelines.jobs.demo import draw_person
from pipelines.run.folder import Run
from scol_ops.distortions import Distortion

pytestmark = pytest.mark.usefixtures("ray_cluster")

SIDE = 250
SEEDS = {"Ada": 15, "Ben": 10, "Cleo": 13, "Dan": 2, "Finn": 22, "Hugo": 23}
JUDGES = ("mobilefacenet", "faceres")


def face(person: str, variant: int = 0) -> np.ndarray:
    image = Image.fromarray(draw_person(SEEDS[person], variant, 256))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def write(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, path.suffix[1:].replace("jpg", "jpeg"), **options)
    path.write_bytes(out.getvalue())


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Path:
    """Ada became Finn, Ben kept his face, Cleo lost hers; the rest is trouble of all kinds."""
    folder = tmp_path_factory.mktemp("evaluate")
    for person in SEEDS:
        for variant in (0, 1):
            write(folder / f"one/{person}/{variant}.jpg", face(person, variant), quality=95, subsampling=0)
    flat = np.full((SIDE, SIDE, 3), 90, np.uint8)
    two = folder / "two"
    write(two / "Ada/0.png", face("Finn"))
    shutil.copytree(folder / "one/Ben", two / "Ben")
    write(two / "Cleo/0.jpg", flat)
    write(two / "Cleo/1.jpg", face("Cleo", 1)[:120])  # another shape
    (two / "Dan").mkdir()
    (two / "Dan/0.jpg").write_bytes(b"\xff\xd8\xff but no picture")
    write(two / "Finn/0.jpg", np.asarray(Image.fromarray(face("Finn")).resize((125, 125))), quality=95)  # smaller
    write(folder / "one/Hugo/2.jpg", flat)  # nobody on it
    write(two / "Hugo/2.jpg", flat)
    write(two / "Hugo/9.jpg", flat)  # of no original
    return folder


def evaluate(trees: Path, two: Path | str = "two", out: str = "out", **options) -> dict:
    options = {"people_from": "folder", "recognisers": JUDGES, "distortions": ("jpeg75+half",), "workers": 1} | options
    given = job.Options(str(trees / "one"), str(trees / two), out=str(trees / out), **options)
    return job.evaluate(given).figures


@pytest.fixture(scope="module")
def figures(trees) -> dict:
    return evaluate(trees)


def faces(trees: Path, out: str = "out") -> dict[str, dict]:
    return {row["path"]: row for row in pq.ParquetFile(trees / out / "faces.parquet").read().to_pylist()}


def test_every_photo_is_counted(trees, figures):
    c = figures["counts"]
    rows = faces(trees)
    assert len(rows) == c["originals"] == c["photos"] == 13
    status = {path: row["status"] for path, row in rows.items()}
    assert status == {
        "Ada/0.jpg": "ok",
        "Ada/1.jpg": "missing",
        "Ben/0.jpg": "ok",
        "Ben/1.jpg": "ok",
        "Cleo/0.jpg": "ok",
        "Cleo/1.jpg": "shape_differs",
        "Dan/0.jpg": "unreadable",
        "Dan/1.jpg": "missing",
        "Finn/0.jpg": "ok",
        "Finn/1.jpg": "missing",
        "Hugo/0.jpg": "missing",
        "Hugo/1.jpg": "missing",
        "Hugo/2.jpg": "no_face",
    }
    assert all((row["reason"] is None) == (row["status"] == "ok") for row in rows.values())
    assert (c["photos_measured"], c["faces_measured"], c["faces_with_mate"]) == (5, 5, 5)
    assert (c["photos_missing"], c["photos_unreadable"], c["photos_shape_differs"], c["photos_no_face"]) == (5, 1, 1, 1)
    assert (c["photos_unchanged"], c["photos_of_another_size"], c["protected_without_original"]) == (2, 1, 1)
    assert c["face_not_found_in_protected"] == 1 and rows["Cleo/0.jpg"]["detected"] is False
    assert c["gallery_people"] == 6


def test_what_the_recognisers_see(trees, figures):
    rows = faces(trees)
    for judge in JUDGES:
        limit = {j["name"]: j["card_threshold"] for j in figures["recognisers"]}[judge]
        assert rows["Ben/0.jpg"][f"ism_{judge}"] == pytest.approx(1, abs=1e-5)
        assert rows["Ben/0.jpg"][f"rank_{judge}"] == rows["Ben/1.jpg"][f"rank_{judge}"] == 1
        assert rows["Ben/0.jpg"][f"rank_{judge}@jpeg75+half"] == 1
        assert rows["Ada/0.jpg"][f"ism_{judge}"] < limit and rows["Ada/0.jpg"][f"rank_{judge}"] > 1
        assert rows["Ada/0.jpg"][f"unprotected_rank_{judge}"] == 1
        assert rows["Finn/0.jpg"][f"ism_{judge}"] > limit and rows["Finn/0.jpg"][f"rank_{judge}"] == 1
        cell = figures["identity"][judge]["protected"]["none"]
        ranks = [row[f"rank_{judge}"] for row in rows.values() if row["status"] == "ok"]
        assert cell["rank1_u"]["value"] == pytest.approx(np.mean([rank > 1 for rank in ranks]))
        assert cell["rank5_u"]["value"] == pytest.approx(np.mean([rank > 5 for rank in ranks]))
        assert cell["rank1_u"]["n"] == 5 and cell["rank1_u"]["low"] < 0.3 < cell["rank1_u"]["high"]
        assert figures["identity"][judge]["unprotected"]["none"]["rank1_u"]["value"] == 0
        assert figures["identity"][judge]["other"]["none"]["rank1_u"]["value"] > 0.5
    # 15 pairs of six people tell no false accept rate of 1 %.
    assert all(v is None for j in figures["recognisers"] for v in j["thresholds"].values())
    assert figures["recognisers"][0]["impostor_pairs"] == 15
    assert figures["identity"]["average"]["protected"]["none"]["verified_own_1e-2"] is None
    each, both = ([figures["identity"][j]["protected"]["none"][m]["value"] for j in JUDGES] for m in ("rank1_u", "ism"))
    average = figures["identity"]["average"]["protected"]["none"]
    assert average["rank1_u"]["value"] == pytest.approx(np.mean(each)) and average["ism"]["value"] == pytest.approx(
        np.mean(both)
    )


def test_what_the_pictures_lost(trees, figures):
    rows = faces(trees)
    same = rows["Ben/0.jpg"]
    assert same["psnr"] == same["photo_psnr"] == float("inf") and same["same_bytes"]
    assert (same["ssim"], same["flip"], same["max_change"], same["photo_max_change"]) == (1, 0, 0, 0)
    assert same["psnr@jpeg75+half"] == float("inf")  # both are distorted alike
    assert same["jod"] == same["jod_4k"] == 10 and same["face_ssim"] == 1
    small = rows["Finn/0.jpg"]
    assert small["same_size"] is False and small["photo_psnr"] is None and 20 < small["psnr"] < 60
    assert small["jod"] is None and small["jod_4k"] is None and 0.8 < small["face_ssim"] < 1
    assert 130 < small["box"][2] < SIDE and 40 < small["box"][0] < 110  # in pixels of the original, not of half of it
    assert 0 < small["mean_change"] < small["max_change"]
    later = rows["Ada/0.jpg"]
    assert later["face_psnr@jpeg75+half"] < 25 and later["max_change@jpeg75+half"] > 50
    assert set(figures["picture"]["face_flip"]) == set(figures["picture"]["psnr"]) == {"none", "jpeg75+half"}
    assert set(figures["picture"]["photo_psnr"]) == set(figures["picture"]["jod"]) == {"none"}
    assert "jod@jpeg75+half" not in later and later["jod"] < 6 and later["face_ssim"] < 0.8
    jods = [row["jod"] for row in rows.values() if row["jod"] is not None]
    assert len(jods) == figures["picture"]["jod"]["none"]["n"] == 4
    assert figures["picture"]["jod"]["none"]["value"] == pytest.approx(np.mean(jods))
    assert figures["picture"]["jod"]["none"]["low"] < figures["picture"]["jod"]["none"]["high"]
    assert figures["distributions"]["jod"]["p5"] == pytest.approx(min(jods), abs=0.01)
    assert figures["distributions"]["ism_faceres@jpeg75+half"]["n"] == 5
    assert rows["Ada/0.jpg"]["psnr"] < 25 and rows["Ada/0.jpg"]["flip"] > 0.1
    assert figures["picture"]["flip"]["none"]["n"] == 5 and figures["picture"]["psnr"]["none"]["n"] == 3
    assert figures["distributions"]["psnr"]["infinite"] == 2


def test_the_files(trees, figures):
    out = trees / "out"
    assert json.loads((out / "evaluation.json").read_text())["counts"] == figures["counts"]
    page = (out / "evaluation.html").read_text()
    assert page.count("<img ") >= 9 and "http" not in page.replace("http-equiv", "")
    assert "8 of 13 photos could not be compared" not in page and "7 of 13 photos could not be compared" in page
    assert all(word in page for word in ("Ben/0.jpg", "jpeg75+half", "somebody else", "best", "median", "worst"))


def test_again_nothing_is_measured_and_a_new_photo_alone_is(trees, figures, monkeypatch):
    parts = trees / "out/work/faces/measure"
    before = sorted(p.name for p in parts.glob("*.parquet"))
    again = evaluate(trees)
    assert sorted(p.name for p in parts.glob("*.parquet")) == before
    drop = ("seconds", "written", "machine")
    assert {k: v for k, v in again.items() if k not in drop} == {k: v for k, v in figures.items() if k not in drop}
    write(trees / "two/Hugo/0.jpg", face("Hugo"))
    try:
        more = evaluate(trees)
        new = {p.name for p in parts.glob("*.parquet")} - set(before)
        keys = [k for name in new for k in pq.ParquetFile(parts / name).read(["key"])["key"].to_pylist()]
        assert len(set(keys)) == 1 and more["counts"]["faces_measured"] == 6
    finally:
        (trees / "two/Hugo/0.jpg").unlink()


def test_other_peoples_photos_are_nearly_all_unknown(trees):
    names = list(SEEDS)
    for person, other in zip(names, names[1:] + names[:1], strict=True):
        for variant in (0, 1):
            write(trees / f"others/{person}/{variant}.png", face(other, variant))
    got = evaluate(trees, "others", "out-others", distortions=(), inside=["faceres"])
    assert got["counts"]["faces_measured"] == 12 and got["counts"]["photos_missing"] == 1  # Hugo/2.jpg
    for judge in JUDGES:
        assert got["identity"][judge]["protected"]["none"]["rank1_u"]["value"] >= 11 / 12
        assert got["identity"][judge]["unprotected"]["none"]["rank1_u"]["value"] == 0
    # The average is over those that the method did not use.
    assert got["identity"]["average"] == got["identity"]["mobilefacenet"]
    assert "faceres" in (trees / "out-others/evaluation.html").read_text().split("left out of the average")[1][:20]


def test_without_people_there_is_no_rank_but_all_else(trees):
    got = evaluate(trees, out="out-nobody", people_from=None, distortions=(), limit=4, photo=False)
    cell = got["identity"]["faceres"]["protected"]["none"]
    assert cell["rank1_u"] is None and cell["ism"]["n"] == got["counts"]["faces_measured"] > 0
    assert got["counts"]["photos_without_person"] == 13
    assert got["counts"]["photos"] == 4 and got["counts"]["gallery_people"] == 0 and "photo_psnr" not in got["picture"]
    assert "There is no Rank-1-U, since nobody is named" in (trees / "out-nobody/evaluation.html").read_text()


def test_protected_files_beside_their_originals(trees):
    """As Fawkes leaves them. A photo that is turned by EXIF, a name that is HTML, a gallery whose names are alike."""
    folder = trees / "beside"
    turned = Image.fromarray(np.rot90(face("Ada"), 1))  # shown upright by orientation 6
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "Ada").mkdir(parents=True)
    turned.save(folder / "Ada/1.jpg", quality=95, subsampling=0, exif=exif)
    write(folder / "Ada/1_cloaked.png", face("Ada"))
    name = "<img src=x onerror=alert(1)>"
    write(folder / f"Ben/{name}.jpg", face("Ben"))
    write(folder / f"Ben/{name}_cloaked.png", face("Finn"))
    for person in SEEDS:  # of another size, so none of them is the probe itself
        write(trees / f"enrolled/{person}/1.jpg", np.asarray(Image.fromarray(face(person, 1)).resize((300, 300))))
    write(trees / "enrolled/nobody.jpg", face("Dan"))
    given = job.Options(
        str(folder),
        str(folder),
        out=str(trees / "out-beside"),
        gallery=str(trees / "enrolled"),
        people_from="folder",
        recognisers=("mobilefacenet",),
        distortions=(),
        drop="_cloaked",
        workers=1,
    )
    got = job.evaluate(given).figures
    c = got["counts"]
    assert (c["originals"], c["protected"], c["photos_measured"], c["protected_without_original"]) == (2, 2, 2, 0)
    assert (c["gallery_people"], c["gallery_photos_unusable"], c["faces_with_mate"]) == (6, 1, 2)
    rows = faces(trees, "out-beside")
    ada, ben = rows["Ada/1.jpg"], rows[f"Ben/{name}.jpg"]
    assert ada["psnr"] > 33 and ada["same_size"] and ada["ism_mobilefacenet"] > 0.9 and ada["rank_mobilefacenet"] == 1
    assert ben["ism_mobilefacenet"] < 0.4 and ben["rank_mobilefacenet"] > 1
    cell = got["identity"]["mobilefacenet"]["protected"]["none"]["rank1_u"]
    assert (cell["value"], cell["n"], cell["people"]) == (0.5, 2, 2)
    assert got["identity"]["mobilefacenet"]["other"]["none"]["rank5_u"] is None  # four others: nobody can be sixth
    page = (trees / "out-beside/evaluation.html").read_text()
    assert "<img src=x" not in page and "onerror=alert" in page and "is not known" in page


def test_a_hostile_name_is_text_wherever_it_stands(trees, figures, tmp_path):
    """As the folders, a photo, a recogniser, its weights, a distortion, who is inside, what names people."""
    nasty = '<img src=x onerror="alert(1)">&\'\u202egpj.exe\n'
    spelled = html.escape(nasty.replace("\u202e", "\\u202e").replace("\n", "\\u000a"))
    told = json.loads(json.dumps(figures).replace("faceres", "NASTY").replace("jpeg75+half", "NASTY+"))
    told = json.loads(json.dumps(told).replace("NASTY", json.dumps(nasty)[1:-1]))
    told |= {"originals": nasty, "protected": nasty, "inside": [nasty], "people_from": nasty}
    told["counts"] |= {"faces_with_mate": 0, "photos_without_person": told["counts"]["originals"]}
    told["recognisers"][1]["fingerprint"] = nasty
    said = [Answers("a.json", nasty, "1", {"a": {"original": "left", "score": 3, "publish": None}})]
    key = {"page": "p", "seed": 0, "pairs": [{"id": "a", "original": "left", "face_id": "f", "person_id": nasty}]}
    told["viewers"] = viewer_figures(key, said)
    columns = [column(m, nasty) for m in ("ism", "mate")] + ["jod", "face_psnr", "face_ssim", "face_flip"]
    found = {name: Distribution(-1, 1) for name in columns}
    found[columns[0]].add(np.array([0.5, 0.25]))
    row = faces(trees)["Ada/0.jpg"]
    row |= {"path": nasty, f"ism_{nasty}": 0.5, "face_id": row["face_id"].replace("-00", "-01")}
    examples = [Example("hidden", "best", row), Example("seen", "worst", row | {"url": str(trees / nasty)})]
    judges = [Judge(nasty, nasty, 0.3, {}, 0, True)]
    run = Run(str(tmp_path))
    write_page(run, told, Summary({}, {}, {}, found), judges, examples)
    page = run.read("evaluation.html").decode()
    assert "<img src=x" not in page and "\u202e" not in page and page.count("<img ") == 3
    page = html.escape(html.unescape(page))  # one way of writing quotes
    text = page[page.index("&lt;header"):]
    # the folders, the judge left out, what names people
    banner, rest = text.split("&lt;/header&gt;")
    assert banner.count(spelled) == 4
    parts = {key: part.count(spelled) for key, part in zip(
        ("summary", "distortions", "pictures", "viewers", "examples", "distributions", "counts", "recognisers"),
        rest.split("&lt;section")[1:], strict=True)}  # fmt: skip
    # per recogniser three lines; its lines and everybody's lines after the distortion; one line of pictures; a figure
    # with three pictures, one without, both with the judge; a viewer's name; its two histograms, one of them drawn;
    # name and weights
    assert parts == {"summary": 3, "distortions": 2 + 3, "pictures": 1, "viewers": 1, "examples": 3 + 4,
                     "distributions": 2 + 1, "counts": 0, "recognisers": 2}, parts  # fmt: skip


def test_the_command(trees, figures):
    run = CliRunner().invoke(
        main,
        [
            "evaluate",
            str(trees / "one"),
            str(trees / "two"),
            "--out",
            str(trees / "out"),
            "--people-from",
            "folder",
            "--recogniser",
            "mobilefacenet",
            "--recogniser",
            "faceres",
            "--distortion",
            "jpeg75+half",
        ],
    )
    assert run.exit_code == 1, run.output  # photos were lost
    assert "| average | protected | " in run.output and "7 of 13 photos could not be compared" in run.output
    for extra in (["--distortion", "gif"], ["--recogniser", "nobody"], ["--out", str(trees / "two/below")]):
        run = CliRunner().invoke(main, ["evaluate", str(trees / "one"), str(trees / "two"), *extra])
        assert run.exit_code == 2 and "error: " in run.output, run.output


def test_viewers_are_asked_and_heard(trees, figures):
    """The page and its key are written beside the figures, answers are read without measuring, and kept later on."""
    out = trees / "out"
    assert "viewers" not in figures and "Nobody was asked" in (out / "evaluation.html").read_text()
    evaluate(trees, viewer=Draw(4, 0.0))
    key = json.loads((out / "viewer-key.json").read_text())
    shown = {Path(p["url"]).relative_to(trees / "one").as_posix() for p in key["pairs"]}
    # Ben's photos are the same files, Finn's is smaller; whoever has no face any more is shown where it was.
    assert shown == {"Ada/0.jpg", "Cleo/0.jpg"} and (out / "viewer.html").stat().st_size > 50_000
    said = {p["id"]: {"original": p["original"], "score": 1, "publish": False} for p in key["pairs"]}
    told = {"version": 1, "page": key["page"], "viewer": "Eve", "session": "1", "answers": said}
    (out / "viewer-answers-Eve.json").write_text(json.dumps(told))
    command = ["evaluate", str(trees / "one"), str(trees / "two"), "--out", str(out), "--viewer-answers", str(out)]
    run = CliRunner().invoke(main, command)
    assert run.exit_code == 0 and "100.0 [34.2, 100.0]" in run.output, run.output
    page = (out / "evaluation.html").read_text()
    assert "Eve" in page and "Nobody was asked" not in page
    again = evaluate(trees)
    assert again["viewers"]["altered"]["right"] == 2 and "Eve" in (out / "evaluation.html").read_text()
    for name in ("viewer.html", "viewer-key.json", "viewer-answers-Eve.json"):
        (out / name).unlink()
    assert "viewers" not in evaluate(trees)


def test_recognisers_used_inside_are_found(trees):
    run = trees / "two.run"
    run.mkdir()
    from pipelines.config.load import ConfigError, load_config

    config = load_config().model_dump(mode="json")
    (run / "run.json").write_text(json.dumps({"config": config}))
    given = job.Options(str(trees / "one"), str(trees / "two"))
    assert job._inside(given) == (("dlib_resnet", "mobilefacenet"), "run")
    shutil.rmtree(run)
    assert judges.inside_of_run(str(run)) is None and job._inside(given) == ((), "unknown")
    attacked = ["tune.identity=", "refine.steps=0", "attack.enabled=true"]
    only = load_config(sets=attacked).model_dump(mode="json")
    assert judges.inside_of(only) == (
        "mobilefacenet",
    )  # the attack works through the encoder, which reads its features
    assert judges.inside_of(load_config("paper").model_dump(mode="json")) == ("irse50",)  # what e4e was made from
    assert load_config("paper").encoder_trunk == "irse50"
    choosing = ["tune.identity=", "refine.identity=", "attack.enabled=false", "strengthen.rounds=0"]
    choosing += ["fuse.identity_ceiling=0.3"]
    assert judges.inside_of(load_config(sets=choosing).model_dump(mode="json")) == ("mobilefacenet",)
    with pytest.raises(ConfigError, match="identity_ceiling chooses by"):
        load_config(sets=[*choosing, "publish.judge=mobilefacenet"])
    with pytest.raises(OutputError):
        evaluate(trees, out="one/below")
    with pytest.raises(EvaluateError, match="lies inside"):
        evaluate(trees, two="one/Ada")
    with pytest.raises(EvaluateError, match="BAD_SETTING"):
        evaluate(trees, distortions=("none",))


def test_a_face_in_a_large_photo_is_distorted_as_in_the_whole(trees):
    """The window's JPEG blocks are the photo's own, and its geometry goes along."""
    photo = np.full((700, 800, 3), 120, np.uint8)
    photo[57 : 57 + SIDE, 133 : 133 + SIDE] = face("Ada")
    eyes = Eyes(("mobilefacenet",))
    spot = eyes.faces(photo)[0]
    window = Window.about(photo, spot)
    assert window.pixels.shape[0] < 500
    whole, _ = Distortion("jpeg50")(photo)
    one = eyes.embed([Window.about(whole, spot)])[0][0]
    two = eyes.embed([window.distorted(Distortion("jpeg50"))])[0][0]
    assert one @ two > 0.999
    shot = window.distorted(Distortion("screenshot"))
    found = eyes.faces(shot.pixels)[0]
    assert np.abs(found.landmarks - shot.spot.landmarks).max() < 4


def test_the_face_alone_is_measured_as_well(trees):
    settings = Settings(("mobilefacenet",), ("jpeg75",), photo=False)
    eyes = Eyes(settings.recognisers)
    worker = Measurer(settings, eyes, Gallery([], [], [np.zeros((0, 256), np.float32)]))
    before = face("Ada")
    spot = eyes.faces(before)[0]
    nose = spot.landmarks[2].astype(int)

    def measured(x: int, y: int) -> dict:
        after = before.copy()
        after[y - 4 : y + 4, x - 4 : x + 4] ^= 64
        windows = [Window.about(p, spot) for p in (before, after)]
        return worker._pictures([windows, [w.distorted(Distortion("jpeg75")) for w in windows]])

    beside, within = measured(*(spot.quad[0, 0].numpy().astype(int).clip(8) + 8)), measured(*nose)
    assert beside["face_psnr"] == float("inf") and beside["face_flip"] < 0.001 < beside["flip"]
    assert beside["face_ssim"] > beside["ssim"] and within["face_ssim"] < within["ssim"]
    assert within["face_psnr"] < within["psnr"] < 45 and within["face_flip"] > within["flip"] > 0.001
    # 64 levels, and what resampling adds.
    assert 40 < beside["max_change"] < 128 and 40 < within["max_change"] < 128 and 0 < within["mean_change"] < 1
    assert within["face_psnr@jpeg75"] < within["psnr@jpeg75"] and within["max_change@jpeg75"] > 40
    assert set(within) == {f"{m}{v}" for m in settings.picture for v in ("", "@jpeg75")}


def test_only_the_middle_face_has_the_photos_name(trees):
    photo = np.full((SIDE, 700, 3), 120, np.uint8)
    photo[:, :SIDE] = face("Ada")
    photo[:, 260 : 260 + SIDE] = face("Ben")
    write(trees / "pair.png", photo)
    settings = Settings(("mobilefacenet",), (), photo=False)
    eyes = Eyes(settings.recognisers)
    found = {n: eyes.embed([Window.about(face(n), eyes.faces(face(n))[0])])[0][0] for n in ("Ada", "Ben", "Dan")}
    gallery = Gallery(list(found), [""] * 3, [np.stack(list(found.values()))])
    url = str(trees / "pair.png")
    rows = Measurer(settings, eyes, gallery).photo(
        {
            "key": "0" * 32,
            "photo_id": "f" * 16,
            "path": "Ben/pair.png",
            "url": url,
            "protected_path": "Ben/pair.png",
            "protected_url": url,
            "person_id": "Ben",
            "mates": [str(trees / "one/Ben/1.jpg")],
            "status": "ok",
            "reason": None,
        }
    )
    assert sorted((r["central"], r["person_id"], r["has_mate"], r.get("rank_mobilefacenet")) for r in rows) == [
        (False, None, False, None),
        (True, "Ben", True, 1),
    ]
    assert set(measure.face_schema(settings).names) >= {k for r in rows for k in r}
    assert Spot(np.zeros((5, 2)), np.arange(4.0)).moved(lambda p: p + 1).box.tolist() == [1, 2, 3, 4]
