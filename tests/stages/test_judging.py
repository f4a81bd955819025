"""The judge's look at a file: windows about faces, transformations, verdicts in words."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines.config.load import ConfigError, load_config
from pipelines.networks import load as networks
from pipelines.stages.judging import Place, bars_of, look, reason_of_weakness
from scol_ops.alignment import ffhq_quads
from scol_ops.detection import FaceDetector
from scol_ops.strengthening import Bars, Seen


@pytest.fixture(scope="module")
def scene(draw_photo):
    """A photo of one face, the stage's columns of where it is, and the judge."""
    pixels = draw_photo([100], width=500, height=420)
    face = FaceDetector("cpu").detect([pixels])[0][0]
    quad = ffhq_quads(torch.from_numpy(face.landmarks)[None].double())[0].numpy()
    row = {"align.quad": quad.reshape(-1), "align.box": face.box, "align.landmarks": face.landmarks.reshape(-1)}
    return SimpleNamespace(pixels=pixels, row=row, judge=networks.recogniser("faceres", torch.device("cpu")))


def test_the_window_is_as_good_as_the_whole_photo(scene) -> None:
    place = Place(scene.row, 500, 420)
    window = place.of(scene)
    assert window.pixels.shape[0] < 420 and window.pixels.shape[1] < 500
    landmarks, box = (torch.from_numpy(np.array(scene.row[f"align.{n}"], np.float32)) for n in ("landmarks", "box"))
    whole = torch.from_numpy(scene.pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = scene.judge.embed_photo(whole, landmarks.reshape(1, 5, 2), box.reshape(1, 4))
    assert torch.allclose(window.embed(scene.judge), expected, atol=1e-5)


def test_a_face_is_found_again_where_a_transformation_has_moved_it(scene) -> None:
    window = Place(scene.row, 500, 420).of(scene)
    seen = look(scene.judge, window.embed(scene.judge), window, ("jpeg75+half", "screenshot", "blur6"))
    assert list(seen.cosines) == ["none", "jpeg75+half", "screenshot", "blur6"]
    assert seen.saved == pytest.approx(1, abs=1e-5) and seen.worst == "none"
    # a screenshot is cropped and shown smaller: with the landmarks left where they were it is another face
    assert 0.9 < seen.cosines["screenshot"] < 1 and 0.9 < seen.cosines["jpeg75+half"] < 1
    assert seen.cosines["blur6"] < seen.cosines["jpeg75+half"]


def test_bars_are_the_judges_own_unless_set(scene) -> None:
    usual, hard = scene.judge.hidden_below, scene.judge.threshold
    assert bars_of(load_config(), scene.judge) == Bars(usual, usual) and usual > hard
    assert bars_of(load_config(sets=["publish.max_ism=threshold"]), scene.judge) == Bars(hard, hard)
    assert bars_of(load_config(sets=["publish.max_ism=0.3"]), scene.judge) == Bars(0.3, 0.3)
    both = load_config(sets=["publish.max_ism=0.3", "publish.max_ism_distorted=0.4"])
    assert bars_of(both, scene.judge) == Bars(0.3, 0.4)


def test_weakness_is_told_with_the_numbers() -> None:
    bars = Bars(0.3, 0.4)

    def words(saved: float, distorted: float, decides: bool = True) -> str | None:
        return reason_of_weakness("faceres", Seen({"none": saved, "jpeg75": distorted, "half": 0.1}), bars, decides)

    assert words(0.3, 0.4) is None and words(0.2, 0.5, decides=False) is None
    assert words(0.35, 0.5, decides=False) == "WEAK_IDENTITY: faceres sees cosine 0.350 to the original, above 0.300"
    assert words(0.2, 0.45) == (
        "WEAK_DISTORTED: faceres sees after jpeg75 cosine 0.450 to the original, above 0.400 (as saved 0.200)"
    )
    assert words(0.35, 0.5).endswith("above 0.300; after jpeg75 0.500, above 0.400")
    assert words(0.5, 0.45).endswith("above 0.300"), "the file as saved is further above its bar"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("publish.distortions=jpg75", "unknown distortion 'jpg75'"),
        ("publish.distortions=none,half", "without 'none'"),
        ("publish.distortions=half,half", "each once"),
        ("publish.max_ism_distorted=2", "publish.max_ism_distorted"),
    ],
)
def test_mistakes(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match="publish") as caught:
        load_config(sets=[text])
    assert words in str(caught.value)
    assert load_config(sets=["publish.distortions=[]"]).publish.distortions == ()
