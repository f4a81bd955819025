"""Rank-1-U of a run and what its stages contribute, on a tree of six generated people, where the answers are known."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from cluster import ray_session
from pipelines.archive.paths import photo_id
from pipelines.cli.main import main
from pipelines.config.load import load_config
from pipelines.config.names import STAGES
from pipelines.evaluate import job, measure, stages
from pipelines.jobs.demo import draw_person
from pipelines.run.folder import Run
from pipelines.run.schemas import PLAN_SCHEMA, SCHEMAS, SOURCE
from scol_ops.detection import FaceDetector
from scol_ops.models.embedded import load_mobilestylegan

SIDE = 250
# Person -> seed; the first two have a second photo. Zoe has one alone, the rest are distractors.
PEOPLE = {"Ada": 15, "Ben": 10, "Zoe": 13, "Dan": 2, "Finn": 22, "Hugo": 23}
PROTECTED = ("Ada/Ada_0001.jpg", "Ben/Ben_0001.jpg", "Zoe/Zoe_0001.jpg")


def jpeg(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def small(person: str, variant: int = 0, side: int = SIDE) -> np.ndarray:
    image = Image.fromarray(draw_person(PEOPLE[person], variant, 256))
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lfw")
    for person in PEOPLE:
        (folder / "photos" / person).mkdir(parents=True)
        (folder / f"photos/{person}/{person}_0001.jpg").write_bytes(jpeg(small(person)))
    for person, variant in (("Ada", 1), ("Ben", 2)):
        (folder / f"photos/{person}/{person}_0002.jpg").write_bytes(jpeg(small(person, variant)))
    (folder / "photos/Dan/Dan_0000.jpg").write_bytes(jpeg(np.full((SIDE, SIDE, 3), 90, np.uint8)))  # nobody on it
    (folder / "photos/Dan/notes.txt").write_text("not a photo")
    return folder


@pytest.fixture(scope="module")
def run(tree) -> Run:
    """A run in which Ada became Finn (hidden as well as can be), Ben and Zoe stayed as they were."""
    run = Run(str(tree / "run"))
    detector = FaceDetector()
    generator = load_mobilestylegan(256)
    with torch.no_grad():  # another person's code: an inversion that lost who it was
        noise = torch.randn(1, 512, generator=torch.Generator().manual_seed(PEOPLE["Hugo"]))
        codes = generator.mapping(noise).repeat(16, 1).reshape(-1).numpy()
    plan, rows = [], {stage: [] for stage in (SOURCE, *STAGES)}
    for i, path in enumerate(PROTECTED):
        source, person = tree / "photos" / path, path.split("/")[0]
        saved = tree / "protected" / path
        saved.parent.mkdir(parents=True, exist_ok=True)
        after = small("Finn") if person == "Ada" else small(person)
        saved.write_bytes(jpeg(after))
        face = detector.detect([small(person)])[0][0]
        # The generator's pictures are FFHQ crops: the quad is the photo's corners.
        low, high = -0.5, SIDE - 0.5
        quad = [low, low, low, high, high, high, high, low]
        name = photo_id(path)
        keys = {stage: f"{i:030x}{n:02x}" for n, stage in enumerate((SOURCE, *STAGES))}
        plan.append({"photo_id": name, "path": path, **keys})
        rows[SOURCE].append({"key": keys[SOURCE], "photo_id": name, "path": path, "url": str(source), "status": "ok"})
        after256 = small("Finn", side=256) if person == "Ada" else small(person, side=256)
        values = {
            "align": {"width": SIDE, "height": SIDE, "box": face.box.tolist(), "quad": quad, "score": face.score,
                      "landmarks": face.landmarks.reshape(-1).tolist(), "crop": png(small(person, side=256))},
            "invert": {"code": codes if person == "Ada" else None}, "fuse": {},
            "tune": {"tuned": png(after256), "refined": None}, "attack": {"protected": png(after256)},
            # The loop made Ben stronger: he became Hugo.
            "strengthen": {"protected": png(small("Hugo", side=256)) if person == "Ben" else None},
            "publish": {"path": path, "action": "protected", "out_path": str(saved), "psnr": 30.0 + i, "ssim": 0.95,
                        "flip": 0.1, "face_psnr": 29.0},
        }
        for stage in STAGES:
            rows[stage].append(dict.fromkeys(SCHEMAS[stage].names) | {
                "key": keys[stage], "photo_id": name, "face_id": f"{name}-00", "status": "ok"} | values[stage])
    run.write_plan(pa.Table.from_pylist(plan, PLAN_SCHEMA))
    for stage, items in rows.items():
        run.store.write_part(stage, None, pa.Table.from_pylist(items, SCHEMAS[stage]))
    config = load_config(sets=['tune.identity=["mobilefacenet"]', 'refine.identity=["mobilefacenet"]'])
    run.write_json("run.json", {"config": config.model_dump(mode="json"), "source": str(tree / "photos")})
    return run


JUDGES = ("mobilefacenet", "faceres")


@pytest.fixture(scope="module", autouse=True)
def ray():
    with ray_session(num_cpus=2):
        yield


def evaluate(tree: Path, run: Run, **options) -> dict:
    given = {"people_from": "folder", "recognisers": JUDGES, "distortions": (), "stages": run.url, "workers": 1}
    given |= {"out": str(tree / "out")} | options
    return job.evaluate(job.Options(str(tree / "photos"), str(tree / "protected"), **given)).figures


@pytest.fixture(scope="module")
def result(run, tree) -> dict:
    return evaluate(tree, run)


def test_the_runs_photos_alone_are_measured(result):
    c = result["counts"]
    assert (c["photos"], c["photos_measured"], c["people"], c["originals"]) == (3, 3, 3, 9)
    assert "photos_missing" not in c and c["faces_without_mate"] == 1  # Zoe
    assert c["gallery_people"] == 6 and c["face_not_found_in_protected"] == 0
    # The run says through whom it was made.
    assert (result["inside"], result["inside_from"]) == (["mobilefacenet"], "run")


def test_rank1_u_is_what_was_built(result):
    for judge in JUDGES:
        before, after = (result["identity"][judge][subject]["none"] for subject in ("unprotected", "protected"))
        assert before["ism"]["n"] == 3 and before["rank1_u"]["n"] == 2
        assert before["rank1_u"]["value"] == 0 and after["rank1_u"]["value"] == 0.5, judge
        assert before["ism"]["value"] == pytest.approx(1, abs=1e-5) and before["accepted_own"]["value"] == 1
        assert after["accepted_own"]["value"] == pytest.approx(2 / 3) and after["accepted_mate"]["value"] == 0.5
        assert after["mate"]["value"] < before["mate"]["value"] - 0.1
    # The average is over those that the method did not use.
    assert result["identity"]["average"] == result["identity"]["faceres"]


def test_stages(result):
    lines = {line["stage"]: line for line in result["stages"]}
    # Nothing was refined or fused, and only Ada has a code.
    faces = {name: line["faces"] for name, line in lines.items()}
    assert faces == {"original": 3, "inverted": 1, "tuned": 3, "attacked": 3, "strengthened": 3}
    assert lines["original"]["psnr"] is None and lines["original"]["judges"]["faceres"]["rank1_u"] == 0
    assert lines["original"]["faces_with_mate"] == 2 and lines["inverted"]["faces_with_mate"] == 1
    assert lines["attacked"]["judges"]["mobilefacenet"]["rank1_u"] == 0.5
    assert lines["inverted"]["judges"]["mobilefacenet"]["rank1_u"] == 1  # Hugo's code
    assert lines["inverted"]["psnr"] < 25 and lines["inverted"]["jod"] < 8 and lines["original"]["jod"] is None
    words = stages.stage_words(result["stages"])
    assert "JOD of the crop's middle" in words and f"| inverted | 1 | {lines['inverted']['jod']:.2f} |" in words
    assert lines["strengthened"]["judges"]["mobilefacenet"]["rank1_u"] == 1  # Ada as attacked, and Ben
    for judge in JUDGES:  # before saving as in the saved file, in which JPEG changes little
        crop, saved = lines["attacked"]["judges"][judge], result["identity"][judge]["protected"]["none"]
        assert crop["accepted_own"] == pytest.approx(2 / 3) and crop["accepted_mate"] == 0.5
        assert crop["ism"] == pytest.approx(saved["ism"]["value"], abs=0.05)
        assert crop["mate"] == pytest.approx(saved["mate"]["value"], abs=0.05)


def test_probes(run):
    found = stages.read_probes(run)
    assert [probe.path for probe in found] == list(PROTECTED) and found[0].spot.landmarks.shape == (5, 2)
    assert [Path(probe.saved_url).parent.name for probe in found] == ["Ada", "Ben", "Zoe"]


def test_a_second_time_nothing_is_embedded_again(run, tree, result):
    def parts() -> dict[str, int]:
        found = (tree / "out/work").rglob("*.parquet")
        return {p.name: p.stat().st_mtime_ns for p in found if not p.name.startswith("gallery-")}

    before = parts()
    again = evaluate(tree, run)
    assert parts() == before and again["identity"] == result["identity"] and again["stages"] == result["stages"]
    plain = evaluate(tree, run, stages=None, inside=(), out=str(tree / "plain"), work=str(tree / "out/work"))
    assert "stages" not in plain and plain["counts"]["photos"] == 9


def test_command(run, tree):
    command = [
        "evaluate",
        str(tree / "photos"),
        str(tree / "protected"),
        "--people-from",
        "folder",
        "--stages",
        run.url,
    ]
    command += ["--recogniser", "faceres", "--no-distortions", "--workers", "1", "--out", str(tree / "command")]
    got = CliRunner().invoke(main, command)
    assert got.exit_code == 0, got.output
    assert "| faceres | protected | 50.0 [" in got.output and "By stage, judged by faceres" in got.output
    rows = [[c.strip() for c in line.strip("| ").split(" | ")] for line in got.output.splitlines()]
    (attacked,) = (row for row in rows if row[0] == "attacked")
    assert attacked[1] == "3" and attacked[-1] == "50.0" and len(attacked) == 11
    got = CliRunner().invoke(main, [*command[:5], "--stages", str(tree / "photos"), *command[7:]])
    assert got.exit_code == 2 and got.output.startswith("error: "), got.output
    got = CliRunner().invoke(main, ["evaluate", str(tree / "photos/Finn"), *command[2:]])
    assert got.exit_code == 2 and "none of the run's photos" in got.output


def test_central():
    boxes = np.array([[0, 0, 10, 10], [40, 40, 60, 60], [90, 90, 99, 99]])
    assert measure.central(boxes, 100, 100) == 1
