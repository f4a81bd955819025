"""The detector on people who do not exist."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pipelines.bench.align import facenet_mtcnn
from scol_ops import detection
from scol_ops.detection import Face, FaceDetector
from scol_ops.models.files import WeightsError


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads wait for each other on a busy machine, many times longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope="module")
def detector():
    return FaceDetector()


@pytest.fixture(scope="module")
def mtcnn():
    return facenet_mtcnn()


def same(a: list[Face], b: list[Face]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x.box, y.box) and np.array_equal(x.landmarks, y.landmarks) for x, y in zip(a, b, strict=True)
    )


def resized(face: np.ndarray, side: int) -> np.ndarray:
    return np.array(Image.fromarray(face).resize((side, side), Image.Resampling.BICUBIC))


def test_networks_are_those_of_facenet_pytorch(mtcnn):
    own = detection._Networks(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        pairs = ((62, own.propose, mtcnn.pnet), (24, own.refine, mtcnn.rnet), (48, own.output, mtcnn.onet))
        for side, ours, theirs in pairs:
            pixels = torch.randint(0, 256, (5, 3, side, side), generator=generator).float()
            *values, probabilities = theirs((pixels - 127.5) / 128)
            out = ours(pixels)
            assert torch.allclose(out[:, 0].sigmoid(), probabilities[:, 1], atol=1e-5)
            assert torch.allclose(out[:, 1:], torch.cat(values, 1), atol=1e-4)


@pytest.mark.parametrize("height, width", [(22, 9), (21, 46), (10, 10), (9, 8)])
def test_pooling_equals_pytorchs(height, width):
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    assert torch.equal(detection._max_pool_3(x), F.max_pool2d(x, 3, 2, ceil_mode=True))
    even = x[..., : height // 2 * 2, : width // 2 * 2]
    assert torch.equal(detection._max_pool_2(even), F.max_pool2d(even, 2))


@pytest.mark.parametrize("height, width", [(250, 250), (64, 900), (1000, 700), (37, 41)])
def test_copies_do_not_overlap(height, width):
    layout = detection._layout(height, width, 20, 0.709)
    for tiles, size in ((layout.octaves, layout.octave_size), (layout.levels, layout.level_size)):
        taken = np.zeros(size, int)
        for t in tiles:
            area = taken[t.top : t.top + t.height, t.left : t.left + t.width]
            assert area.shape == (t.height, t.width)
            area += 1
        assert taken.max() == 1


def test_finds_faces_where_ffhq_puts_them(detector, draw_face):
    # FFHQ's rule places eyes and mouth; in a 256 px picture the eyes are near (96, 119) and (160, 119).
    found = detector.detect([draw_face(seed) for seed in range(6)])
    assert [len(faces) for faces in found] == [1] * 6
    for (face,) in found:
        assert face.score >= 0.9 and face.landmarks.dtype == face.box.dtype == np.float32
        assert face.landmarks.shape == (5, 2) and face.box.shape == (4,)
        assert np.abs(face.landmarks[:2] - [[96, 119], [160, 119]]).max() < 14
        assert np.abs(face.landmarks[3:].mean(0) - [128, 187]).max() < 16
        assert np.array_equal(face.box * 64, np.round(face.box * 64))


def test_agrees_with_facenet_pytorch(detector, mtcnn, draw_photo):
    photos = [draw_photo([seed, seed + 1], 620, 340) for seed in (0, 2, 4)]
    for photo, faces in zip(photos, detector.detect(photos), strict=True):
        boxes, scores, marks = mtcnn.detect(Image.fromarray(photo), landmarks=True)
        keep = scores.astype(float) >= 0.9
        assert keep.sum() == len(faces) == 2
        for box, points in zip(boxes[keep], marks[keep], strict=True):
            nearest = min(faces, key=lambda f: np.abs(f.box - box).sum())
            assert np.abs(nearest.landmarks + 1 - points).mean() < 0.04 * (box[2] - box[0])


def test_result_does_not_depend_on_company(detector, draw_face, draw_photo):
    photos = [draw_photo([s], 300, 300) for s in range(3)] + [draw_photo([4, 5], 560, 300), draw_face(6)]
    photos += [draw_photo([s], 300, 300) for s in range(7, 10)]
    together = detector.detect(photos)
    assert all(together)
    assert all(same(faces, detector.detect([photo])[0]) for photo, faces in zip(photos, together, strict=True))
    backwards = FaceDetector(batch_size=2).detect(photos[::-1])[::-1]
    assert all(same(a, b) for a, b in zip(together, backwards, strict=True))


def test_largest_first_then_left_to_right(detector, draw_face):
    photo = np.full((300, 700, 3), 120, np.uint8)
    for left, side in ((20, 130), (200, 220), (480, 130)):
        photo[40 : 40 + side, left : left + side] = resized(draw_face(1), side)
    faces = detector.detect([photo])[0]
    assert len(faces) == 3
    assert [f.area for f in faces] == sorted((f.area for f in faces), reverse=True)
    assert 200 < faces[0].box[0] < 420
    ties = [Face(np.array([x, 0, x + 8, 8], np.float32), np.zeros((5, 2), np.float32), 1.0) for x in (30, 10)]
    assert detection._in_order(ties) == [ties[1], ties[0]]


def test_small_face_in_a_20_megapixel_photo(detector, draw_face):
    # Smallest face by the docstring: 20 * 5472 / 1600 = 68 px.  This one's box is about 90 px.
    photo = np.full((3648, 5472, 3), 120, np.uint8)
    photo[2000:2160, 3000:3160] = resized(draw_face(1), 160)
    (face,) = detector.detect([photo])[0]
    assert 68 <= face.box[2] - face.box[0] < 120
    (whole,) = detector.detect([draw_face(1)])[0]
    expected = (whole.landmarks + 0.5) * 160 / 256 - 0.5 + [3000, 2000]
    assert np.abs(face.landmarks - expected).max() < 5


def test_face_cut_by_the_edge_is_found_and_clipped(detector, draw_face):
    photo = np.full((300, 300, 3), 120, np.uint8)
    photo[20:276, :196] = draw_face(1)[:, 60:]
    (face,) = detector.detect([photo])[0]
    assert face.box.min() >= -0.5 and face.box.max() <= 299.5


@pytest.mark.parametrize("shape", [(1, 1), (11, 400), (12, 12), (20, 20), (20, 3000), (0, 10)])
def test_tiny_photos_have_no_faces(detector, shape):
    assert detector.detect([np.zeros((*shape, 3), np.uint8)]) == [[]]


def test_no_photos_and_no_faces(detector):
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    assert detector.detect([]) == []
    assert detector.detect([noise, np.full_like(noise, 90)]) == [[], []]


def test_any_memory_layout(detector, draw_face):
    face = draw_face(2)
    frozen = face.copy()
    frozen.flags.writeable = False
    flipped = np.ascontiguousarray(face[:, ::-1])[:, ::-1]
    expected = detector.detect([face])[0]
    assert expected and all(same(expected, detector.detect([p])[0]) for p in (frozen, flipped, np.asfortranarray(face)))


def test_min_confidence(draw_face):
    photos = [draw_face(s) for s in range(4)]
    scores = [f[0].score for f in FaceDetector(min_confidence=0).detect(photos)]
    limit = sorted(scores)[2]
    found = FaceDetector(min_confidence=limit).detect(photos)
    assert [len(f) for f in found] == [int(s >= limit) for s in scores] and min(scores) < limit


def test_bad_input(detector):
    with pytest.raises(TypeError, match="photo 1"):
        detector.detect([np.zeros((50, 50, 3), np.uint8), np.zeros((50, 50, 3), np.float32)])
    with pytest.raises(ValueError, match="shape"):
        detector.detect([np.zeros((50, 50), np.uint8)])
    for options in ({"min_face_size": 0}, {"thresholds": (0.6, 0.7)}, {"factor": 1.0}, {"max_side": 10},
                    {"batch_size": 0}, {"min_confidence": 1.5}, {"min_face_size": float("nan")}):
        with pytest.raises(ValueError):
            FaceDetector(**options)


def test_refuses_other_weights(monkeypatch):
    before = detection.weights_fingerprint()
    monkeypatch.setitem(detection.SHA256, "rnet.pt", "0" * 64)
    assert detection.weights_fingerprint() != before
    with pytest.raises(WeightsError, match="rnet.pt"):
        FaceDetector()
