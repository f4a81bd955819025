"""The Python API: the pipeline's own results, without its folder and without Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipelines.api import PictureError, Protector
from pipelines.cli.main import main
from pipelines.config.load import ConfigError
from pipelines.run.folder import Run
from pipelines.run.tables import read_stage

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "gallery.synthetic=12", "fuse.k=3", "tune.steps=1", "refine.steps=2", "attack.steps=1", "invert.refine_steps=1",
    "strengthen.rounds=1", "strengthen.steps=1", "publish.max_ism=-1", "publish.min_jod=0", "publish.distortions=half",
    "attack.enabled=true", "engine.device=cpu", "engine.threads=1", "engine.workers=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def protector() -> Iterator[Protector]:
    with Protector("quick", sets=SETTINGS) as made:
        yield made


@pytest.fixture(scope="module")
def pictures(draw_photo) -> dict[str, np.ndarray]:
    """Two people, one on grey, and nobody."""
    two = draw_photo([100, 101], width=560)
    grey = np.asarray(Image.fromarray(draw_photo([102])).convert("L"))
    return {"deep/two.png": two, "grey.png": grey, "nobody.png": np.full((60, 80, 3), 90, np.uint8)}


def test_it_is_what_the_pipeline_makes(protector, pictures, tmp_path: Path) -> None:
    for name, pixels in pictures.items():
        place = tmp_path / "photos" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    command = ["protect", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--profile", "quick", *sets]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    rows = {row["face_id"]: row for row in read_stage(Run(f"{tmp_path}/out.run"), "publish").to_pylist()}

    found = dict(zip(pictures, protector.protect_many(pictures.values(), pictures), strict=True))
    counts = {name: len(protected.faces) for name, protected in found.items()}
    assert counts == {"deep/two.png": 2, "grey.png": 1, "nobody.png": 0}
    for name, protected in found.items():
        with Image.open(tmp_path / "out" / name) as saved:
            assert np.array_equal(protected.image, np.asarray(saved)), name
        assert protected.image.shape == pictures[name].shape and protected.image.dtype == np.uint8
    faces = [face for protected in found.values() for face in protected.faces]
    theirs = [row for row in rows.values() if row["face_id"] is not None]
    assert sorted(face.measures["ism"] for face in faces) == sorted(row["ism"] for row in theirs)
    for face in faces:
        assert face.status == "weak" and face.reason.startswith("WEAK_IDENTITY: ")  # no cosine is below -1
        assert {"psnr", "ssim", "flip", "judge", "max_ism"} <= set(face.measures) and set(face.distorted) == {"half"}
        x0, y0, x1, y1 = face.box
        assert x0 < x1 and y0 < y1 and face.landmarks.shape == (5, 2)
    nobody = found["nobody.png"]
    assert nobody.status == "no_face" and np.array_equal(nobody.image, pictures["nobody.png"])


def test_types_come_back_and_equal_pictures_give_equal_results(protector, pictures) -> None:
    pixels = pictures["grey.png"]
    first, second = protector.protect(Image.fromarray(pixels)), protector.protect(pixels)
    assert isinstance(first.image, Image.Image) and first.image.mode == "L"
    assert np.array_equal(np.asarray(first.image), second.image) and not np.array_equal(second.image, pixels)
    left = [path for path in Path(protector._folder.name).rglob("*.png")]
    assert not left, "a picture stays in the temporary files"


def test_a_picture_that_fails_has_no_image(pictures) -> None:
    with Protector("quick", sets=[*SETTINGS, "align.max_faces=1"]) as strict:
        failed, well = strict.protect_many([pictures["deep/two.png"], pictures["nobody.png"]])
        folder = Path(strict._folder.name)
    assert failed.image is None and failed.status == "error" and failed.reason.startswith("TOO_MANY_FACES: ")
    assert well.status == "no_face" and well.image is not None
    assert not folder.exists()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4, 2), np.uint8), r"\(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), "without pixels"),
        (Image.new("CMYK", (4, 4)), "CMYK"),
        (b"bytes", "bytes"),
    ],
)
def test_what_is_no_picture_is_refused(protector, image, words: str) -> None:
    with pytest.raises(PictureError, match=words):
        protector.protect(image)


def test_names_and_settings_are_checked(protector, pictures) -> None:
    with pytest.raises(PictureError, match="name: "):
        protector.protect(pictures["nobody.png"], "../up.png")
    with pytest.raises(ValueError):
        protector.protect_many([pictures["nobody.png"]], ["a.png", "b.png"])
    with pytest.raises(ConfigError):
        Protector("quick", sets=["tune.stepz=1"])


def test_it_starts_no_ray() -> None:
    code = "import sys, json; import pipelines.api; print(json.dumps('ray' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and json.loads(done.stdout) is False, done.stderr
