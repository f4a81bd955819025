import subprocess
import sys

import numpy as np
import pytest
import torch

from scol_ops.alignment import ffhq_quads
from scol_ops.visibility import DISPLAYS, OutsideError, face_jod, face_window, jod, jod_map

# Of `pair(height, width)` saved as BMP, by the package's own command in an environment that has all it asks for:
#   python -m pycvvdp.run_cvvdp -r reference.bmp -t test.bmp -d DISPLAY --device cpu --heatmap raw --result FILE
# (cvvdp 0.5.7, torch 2.14.1): JOD, and the mean and the largest level of its heat map's file (255 for 10 JOD).
MEASURED = {
    (96, 120, "standard_fhd"): (9.480364799499512, 5.15998, 31),
    (96, 120, "standard_4k"): (9.673748016357422, 2.08958, 18),
    (101, 64, "standard_fhd"): (9.522422790527344, 4.71890, 30),
    (101, 64, "standard_4k"): (9.704264640808105, 1.75433, 18),
    (300, 280, "standard_fhd"): (9.494750022888184, 5.03189, 28),
    (300, 280, "standard_4k"): (9.676867485046387, 2.04926, 17),
}


def pair(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture with some grain, and the same with ripples on its right two thirds: whole numbers, alike anywhere."""
    y, x = np.mgrid[:height, :width]
    grain = np.random.default_rng(7).integers(-6, 7, (height, width, 3))
    reference = np.stack([60 + (3 * x + 2 * y + 40 * c) % 97 + (x * y // 50) % 23 for c in range(3)], -1) + grain
    ripple = np.stack([(x // 3 + y // (5 + c)) % 2 * 14 - 7 for c in range(3)], -1) * (x > width // 3)[..., None]
    return reference.astype(np.uint8), (reference + ripple).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "width", "display"), MEASURED)
def test_numbers_are_those_of_the_package_s_own_command(height: int, width: int, display: str):
    score, mean, most = MEASURED[height, width, display]
    reference, test = pair(height, width)
    assert jod(reference, test, display) == pytest.approx(score, abs=2e-4)
    lost = jod_map(reference, test, display)
    assert lost.shape == (height, width) and lost.dtype == np.float32
    levels = (lost * 25.5).astype(np.uint8)  # as the command writes it
    assert levels.mean() == pytest.approx(mean, abs=0.01) and abs(int(levels.max()) - most) <= 1


def test_equal_pictures_lose_nothing():
    for display in DISPLAYS:
        for side in (1, 7, 40, 1100):
            picture = pair(side, side + 1)[0]
            assert jod(picture, picture.copy(), display) == 10
        assert jod_map(picture, picture.copy(), display).max() == 0


def test_more_change_is_seen_more_and_where_it_is():
    reference = pair(120, 120)[0]
    scores = []
    for change in (0, 2, 6, 20):
        test = reference.copy()
        test[40:60, 80:100] += np.uint8(change)
        scores.append(jod(reference, test))
        lost = jod_map(reference, test)
    assert scores[0] == 10 and sorted(scores, reverse=True) == scores and len(set(scores)) == 4
    assert scores[-1] < 9.9
    assert lost[40:60, 80:100].mean() > 0.5 and lost[:, :40].max() < 0.05
    assert np.unravel_index(lost.argmax(), lost.shape) > (35, 75)


def test_small_and_narrow_pictures_have_a_number():
    for height, width in ((1, 1), (1, 30), (3, 200), (7, 7), (9, 8)):
        reference, test = pair(height, width)
        assert 0 < jod(reference, test) <= 10 and jod_map(reference, test).shape == (height, width)
    # Mirrored: as the picture of 8 rows that a mirror makes of it.
    reference, test = pair(4, 30)
    doubled = [np.concatenate([p, p[::-1]]) for p in (reference, test)]
    assert jod(reference, test) == jod(*doubled) < 10
    assert (jod_map(reference, test) == jod_map(*doubled)[:4]).all()


def test_large_pictures_are_compared_at_1080_pixels():
    reference, test = pair(540, 360)
    large = [p.repeat(3, 0).repeat(3, 1) for p in (reference, test)]  # 1620 x 1080
    fitted = [np.asarray(torch.nn.functional.interpolate(
        torch.from_numpy(p).movedim(2, 0)[None].double(), (1080, 720), mode="area"
    )[0].movedim(0, 2)) for p in large]
    # Three pixels of one colour on two: the middle one is halved between two levels, which bytes round.
    rounded = [p.round().astype(np.uint8) for p in fitted]
    assert jod(*large) == pytest.approx(jod(*rounded), abs=0.01)
    lost = jod_map(*large)
    assert lost.shape == (1620, 1080)
    assert lost[:, 500:].mean() > 5 * lost[:, :300].mean()


def test_what_is_not_two_pictures_is_refused():
    picture = pair(20, 20)[0]
    wrong = [picture.astype(np.float32), picture[..., 0], picture[:10], picture[:0], torch.from_numpy(picture)]
    for other in wrong:
        for measure in (jod, jod_map):
            with pytest.raises(ValueError):
                measure(picture, other)
    with pytest.raises(ValueError, match="standard_4k"):
        jod(picture, picture, "cinema")


def test_face_window_is_the_middle_of_the_crop():
    square = [[100, 50], [100, 150], [200, 150], [200, 50]]
    assert face_window(square, 640, 480) == (120, 70, 180, 130)
    assert face_window(np.array(square, float).ravel().tolist(), 640, 480) == (120, 70, 180, 130)
    assert face_window(np.array(square) + 0.5, 640, 480) == (120, 70, 181, 131)  # outwards
    assert face_window(square, 170, 100) == (120, 70, 170, 100)
    assert face_window(np.array(square) - [140, 90], 640, 480) == (0, 0, 40, 40)
    turned = [[150, 50], [100, 100], [150, 150], [200, 100]]  # by an eighth: the side is 100 / sqrt 2
    assert face_window(turned, 640, 480) == (128, 78, 172, 122)
    landmarks = torch.tensor([[[80.0, 90], [120, 90], [100, 110], [85, 130], [115, 130]]])
    left, top, right, bottom = face_window(ffhq_quads(landmarks)[0].numpy(), 400, 400)
    assert left <= 80 and right >= 120 and top <= 90 and bottom >= 130


def test_face_window_beside_the_photo_or_of_no_square_is_refused():
    square = np.array([[100, 50], [100, 150], [200, 150], [200, 50]], float)
    for shift in ((-200, 0), (600, 0), (0, -150), (0, 500)):
        with pytest.raises(OutsideError, match="outside"):
            face_window(square + shift, 640, 480)
    for wrong in (square[:3], square * np.nan):
        with pytest.raises(ValueError, match="8 finite"):
            face_window(wrong, 640, 480)


def test_face_jod_is_that_of_the_window():
    reference, test = pair(200, 220)
    quad = [[70, 30], [70, 130], [170, 130], [170, 30]]
    window = [p[50:110, 90:150] for p in (reference, test)]
    found = face_jod(reference, test, quad)
    assert found == {"jod": jod(*window), "jod_4k": jod(*window, "standard_4k")} and found["jod"] < found["jod_4k"]
    beside = np.array(quad) + [400, 0]
    assert face_jod(reference, test, beside) == {"jod": None, "jod_4k": None}
    with pytest.raises(ValueError, match="8 finite"):
        face_jod(reference, test, quad[:2])
    with pytest.raises(ValueError, match="differ in size"):
        face_jod(reference, test[:-1], beside)


def test_the_package_leaves_no_traces():
    """No names, paths or handlers of its own stay behind, and nothing of it is loaded before it is asked for."""
    code = """
import sys, logging
import numpy as np
from scol_ops import visibility
assert not [n for n in sys.modules if n.startswith("torchvision")]
path = list(sys.path)
picture = np.zeros((20, 20, 3), np.uint8)
assert visibility.jod(picture, picture) == 10
names = ("pycvvdp", "interp", "third_party", "ffmpeg", "torch.utils.benchmark")
left = [n for n in sys.modules if n in names or n.startswith("pycvvdp.")]
print(left, sys.path == path, logging.getLogger().handlers)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]", "True", "[]"] and done.stderr == ""
