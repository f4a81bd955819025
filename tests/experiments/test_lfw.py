"""The LFW experiment on a tree of six generated people, where the right answers are known."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipelines.archive.paths import photo_id
from pipelines.config.load import load_config
from pipelines.config.names import STAGES
from pipelines.experiments import lfw, probes
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


@pytest.fixture(scope="module")
def result(run, tree) -> dict:
    said = []
    out = lfw.run_experiment(run.url, distractors=1000, judges=["mobilefacenet", "faceres"], stages=True,
                             cache=tree / "cache", say=said.append)
    assert any("6 photos embedded anew" in line or "5 photos embedded anew" in line for line in said)
    return out


def test_counts(result):
    c = result["counts"]
    assert (c["photos"], c["protected"], c["probes"], c["people"], c["failed"], c["no_face"]) == (3, 3, 3, 3, 0, 0)
    assert c["people_without_another_photo"] == 1  # Zoe
    assert (c["distractors"], c["gallery"]) == (3, 5)
    assert c["face_not_detected_in_saved"] == 0


def test_rank1_u_is_what_was_built(result):
    for entry in result["judges"]:
        before, after = entry["unprotected"], entry["protected"]
        assert before["probes"] == 3 and before["with_mate"] == 2
        assert before["rank1_u"] == 0 and after["rank1_u"] == 0.5, entry
        assert before["own"] == pytest.approx(1, abs=1e-5) and before["own_accepted"] == 1
        assert after["own_accepted"] == pytest.approx(2 / 3) and after["mate_accepted"] == 0.5
        assert after["mate"] < before["mate"] - 0.1
    assert [e["inside_method"] for e in result["judges"]] == [True, False]
    assert result["quality"]["psnr"] == {"mean": 31.0, "min": 30.0, "max": 32.0}


def test_stages(result):
    lines = {line["stage"]: line for line in result["stages"]}
    # Nothing was refined or fused, and only Ada has a code.
    faces = {name: line["faces"] for name, line in lines.items()}
    assert faces == {"original": 3, "inverted": 1, "tuned": 3, "attacked": 3, "strengthened": 3}
    assert lines["original"]["psnr"] is None and lines["original"]["judges"]["faceres"]["rank1_u"] == 0
    assert lines["attacked"]["judges"]["mobilefacenet"]["rank1_u"] == 0.5
    assert lines["inverted"]["judges"]["mobilefacenet"]["rank1_u"] == 1  # Hugo's code
    assert lines["inverted"]["psnr"] < 25
    assert lines["strengthened"]["judges"]["mobilefacenet"]["rank1_u"] == 1  # Ada as attacked, and Ben


def test_second_run_takes_the_gallery_from_the_cache(run, tree, result):
    said = []
    again = lfw.run_experiment(run.url, str(tree / "photos"), judges=["mobilefacenet"], cache=tree / "cache",
                               say=said.append)
    assert "gallery of 5 people, 0 photos embedded anew" in said
    assert again["judges"][0] == result["judges"][0]
    assert "stages" not in again
    # By default the judges are those that the method did not use.
    default = lfw.run_experiment(run.url, distractors=1, cache=tree / "cache")
    assert [e["judge"] for e in default["judges"]] == ["dlib_resnet", "faceres"]
    assert default["counts"]["distractors"] == 1


def test_command(run, tree, tmp_path, capsys):
    threads = torch.get_num_threads()
    path = tmp_path / "bench" / "lfw.json"
    status = lfw.main([run.url, "--judge", "faceres", "--cache", str(tree / "cache"), "--json", str(path),
                       "--threads", str(threads)])
    out = capsys.readouterr().out
    assert status == 0 and json.loads(path.read_text())["experiment"] == "lfw"
    assert path.with_suffix(".md").read_text() in out
    assert "| faceres | protected |" in out and "| 50.0 |" in out
    assert lfw.main([str(tmp_path), "--json", str(path)]) == 2
    assert lfw.main([run.url, "--photos", str(tree / "photos/Finn"), "--json", str(path)]) == 2
    assert "none of the run's photos" in capsys.readouterr().err


def test_central():
    assert probes.central([[0, 0, 10, 10], [40, 40, 60, 60], [90, 90, 99, 99]], 100, 100) == 1
