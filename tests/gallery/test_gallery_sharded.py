"""A gallery in parts answers as it does in one process."""

import numpy as np
import pytest

from gallery_index import (
    MODES,
    CodeBatch,
    Expectation,
    Gallery,
    GalleryMismatchError,
    NotEnoughCodesError,
    ShardedGallery,
    build,
    make_part,
)
from gallery_index import builder as builder_module
from gallery_index.sharded import extents
from tests.helpers.gallery_reference import random_codes

NAMES = ("most_ids", "most_scores", "most_vectors", "least_ids", "least_scores", "least_vectors")


def in_process(url, parts, **options):
    """Parts that are called one after the other, without a cluster."""

    def start(fingerprint, folder, extents_):
        answers = [make_part(folder, fingerprint, extent) for extent in extents_]
        return lambda requests: [answer(r) for answer, r in zip(answers, requests, strict=True)]

    return ShardedGallery(url, parts, start, **options)


def same(a, b):
    for name in NAMES:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(builder_module, "_FILE_BYTES", 70 * 4 * 16 * 4)  # files of 70 rows, bands across them


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parts", [1, 2, 4, 6, 12])
def test_equals_the_single_process(tmp_path, small_files, mode, parts):
    codes, queries = random_codes(301, 4, 16), random_codes(7, 4, 16, seed=1)
    codes[200:220] = codes[20:40]  # ties across parts
    queries[0] = codes[25]
    ids = [f"i{i:03d}" for i in np.random.default_rng(0).permutation(301)]
    people = [f"p{i % 9}" for i in range(301)]
    build(tmp_path, [CodeBatch(codes, ids, people)], mode=mode, weights={})
    whole, split = Gallery.load(tmp_path), in_process(tmp_path, parts)
    same(split.search(queries, 12), whole.search(queries, 12))
    mask = np.random.default_rng(1).random((7, 301)) < 0.5
    mask[2] = True
    mask[2, [3, 40, 77, 150, 299]] = False  # some parts have nothing left for this query
    mask[3, :290] = True
    options = dict(exclude_mask=mask, exclude_person_ids=["p1", None, None, None, ["p2", "p3"], None, None])
    same(split.search(queries, 5, **options), whole.search(queries, 5, **options))
    with pytest.raises(NotEnoughCodesError) as one:
        whole.search(queries, 6, **options)
    with pytest.raises(NotEnoughCodesError) as other:
        split.search(queries, 6, **options)
    assert str(one.value) == str(other.value)
    same(split.search(queries[:0], 3), whole.search(queries[:0], 3))


def test_broadcast_and_embeddings(tmp_path, small_files):
    codes, queries = random_codes(120, 1, 16), random_codes(3, 5, 16, seed=1)
    faces = np.random.default_rng(0).normal(size=(120, 6)).astype(np.float32)
    ids = [f"i{i}" for i in range(120)]
    build(tmp_path, [CodeBatch(codes, ids, ids, ids, faces)], weights={}, broadcast_layers=5)
    whole, split = Gallery.load(tmp_path), in_process(tmp_path, 3)
    options = dict(identity_embeddings=faces[:3], identity_ceiling=0.3)
    same(split.search(queries, 4, **options), whole.search(queries, 4, **options))
    # one W serves any number of layers
    whole, split = Gallery.load(tmp_path, layers=7), in_process(tmp_path, 2, layers=7)
    queries = random_codes(2, 7, 16, seed=2)
    same(split.search(queries, 4), whole.search(queries, 4))


def test_extents_and_expectations(tmp_path):
    for layers, count, parts in ((1, 10, 1), (1, 10, 7), (16, 1000, 8), (16, 1000, 48), (5, 3, 10)):
        grid = np.zeros((layers, count), int)
        found = extents(layers, count, parts)
        for e in found:
            grid[e.first : e.last, e.start : e.stop] += 1
        assert len(found) == parts and (grid == 1).all()
    with pytest.raises(ValueError, match="cannot be split"):
        extents(2, 3, 14)
    build(tmp_path, [CodeBatch(random_codes(9, 2, 8), list("abcdefghi"))], weights={})
    with pytest.raises(GalleryMismatchError, match="fingerprint"):
        in_process(tmp_path, 2, expect=Expectation(fingerprint="0" * 32))
    info = Gallery.load(tmp_path).info
    with pytest.raises(GalleryMismatchError, match=info.fingerprint):
        make_part(str(tmp_path), "0" * 32, extents(2, 9, 1)[0])
    with pytest.raises(GalleryMismatchError, match="mean's sha256"):
        Gallery.load(tmp_path, expect=Expectation(mean="0" * 64))
