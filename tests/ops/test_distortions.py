import io

import numpy as np
import pytest
from PIL import Image

from scol_ops.distortions import STANDARD, Distortion, Placement
from scol_ops.metrics import psnr


def smooth(height: int = 96, width: int = 128) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([127 + 100 * np.sin(x / 9), 127 + 100 * np.cos(y / 7), 2 * x], -1).clip(0, 255).astype(np.uint8)


def test_codecs_are_pillows():
    a = smooth()
    for name, format in (("jpeg75", "JPEG"), ("webp60", "WEBP")):
        out = io.BytesIO()
        Image.fromarray(a).save(out, format, quality=int(name[4:]))
        expected = np.asarray(Image.open(io.BytesIO(out.getvalue())).convert("RGB"))
        got, place = Distortion(name)(a)
        assert np.array_equal(got, expected) and place == Placement()


def test_chains_run_from_left_to_right():
    a = smooth()
    step = Distortion("half")(Distortion("jpeg50")(a)[0])[0]
    assert np.array_equal(Distortion("jpeg50+half")(a)[0], step)
    assert not np.array_equal(Distortion("half+jpeg50")(a)[0], step)
    assert np.array_equal(Distortion("none")(a)[0], a)
    assert psnr(a, Distortion("jpeg95")(a)[0]) > psnr(a, Distortion("jpeg50")(a)[0])
    assert psnr(a, Distortion("blur0.5")(a)[0]) > psnr(a, Distortion("blur3")(a)[0])


def test_points_go_along():
    """A white square is found where the placement says."""
    a = np.zeros((100, 140, 3), np.uint8)
    a[40:50, 60:70] = 255  # centre x 64.5, y 44.5
    for name in (*STANDARD, "screenshot+screenshot+resize60"):
        got, place = Distortion(name)(a)
        y, x = np.mgrid[: got.shape[0], : got.shape[1]]
        weight = got[..., 1].astype(float) * (got[..., 1] > 60)
        found = [(x * weight).sum() / weight.sum(), (y * weight).sum() / weight.sum()]
        assert place.points([64.5, 44.5]) == pytest.approx(found, abs=0.3), name
    assert Distortion("screenshot")(a)[0].shape == (75, 105, 3)


@pytest.mark.parametrize(
    "name",
    [
        "jpeg",
        "jpeg0",
        "jpeg101",
        "jpeg7.5",
        "half2",
        "blur0",
        "blur",
        "resize1",
        "gif",
        "",
        "jpeg75+",
        "jpeg75++half",
        "screenshot9",
    ],
)
def test_unknown_ones_are_refused(name):
    with pytest.raises(ValueError, match="distortion"):
        Distortion(name)
