import numpy as np
import pytest
import torch

from gallery_index import MODES, NotEnoughCodesError, QueryError
from gallery_index import search as search_module
from gallery_index.reference import faiss_search
from tests.helpers.gallery_reference import brute_force, random_codes


def check(gallery, codes, queries, k, excluded=None, **options):
    result = gallery.search(queries, k, **options)
    ids = list(gallery.ids)
    most, most_scores, least, least_scores = brute_force(codes, ids, queries, k, gallery.mode, excluded)
    assert (result.most_ids == most).all()
    assert (result.least_ids == least).all()
    np.testing.assert_allclose(result.most_scores, most_scores, rtol=2e-7, atol=2e-7)
    np.testing.assert_allclose(result.least_scores, least_scores, rtol=2e-7, atol=2e-7)
    row = {id_: i for i, id_ in enumerate(ids)}
    for layer in range(codes.shape[1]):
        for b in range(len(queries)):
            np.testing.assert_array_equal(result.most_vectors[b, layer], codes[[row[i] for i in most[b, layer]], layer])
            np.testing.assert_array_equal(result.least_vectors[b, layer], codes[row[least[b, layer]], layer])
    return result


@pytest.fixture(params=[False, True], ids=["one-block", "small-blocks"])
def blocks(request, monkeypatch):
    """Small galleries fit in one block; make them span many, with an uneven last one."""
    if request.param:
        monkeypatch.setattr(search_module, "_MIN_BLOCK", 64)
        monkeypatch.setattr(search_module, "_SCORES_PER_BLOCK", 64)
        monkeypatch.setattr(search_module, "_MAX_QUERIES", 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("n", "batch", "k"), [(1021, 9, 10), (333, 1, 1), (67, 4, 67), (5, 2, 3), (2, 1, 2)])
def test_equals_float64_brute_force(make, blocks, mode, n, batch, k):
    codes, queries = random_codes(n, 3, 48), random_codes(batch, 3, 48, seed=1)
    check(make(codes, mode), codes, queries, k)


@pytest.mark.parametrize("mode", MODES)
def test_random_cases(make, blocks, mode):
    """Sizes, exclusions and repeated codes at random (seeded)."""
    rng = np.random.default_rng(5)
    for case in range(12):
        n, layers, dim = int(rng.integers(3, 400)), int(rng.integers(1, 4)), int(rng.integers(2, 40))
        codes = random_codes(n, layers, dim, seed=case)
        codes[rng.integers(0, n, n // 3)] = codes[rng.integers(0, n, n // 3)]
        batch = int(rng.integers(1, 12))
        mask = rng.random((batch, n)) < rng.choice([0.0, 0.1, 0.6])
        mask[:, rng.integers(0, n, 2)] = False
        k = int(rng.integers(1, min(20, (n - mask.sum(axis=1)).min()) + 1))
        queries = random_codes(batch, layers, dim, seed=100 + case)
        check(make(codes, mode, name=f"g{case}"), codes, queries, k, mask, exclude_mask=mask)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("copies", [2, 40, 300])
def test_ties_come_in_the_order_of_ids(make, blocks, mode, copies):
    """More equal codes than there are spare candidates, spread over the blocks."""
    codes = random_codes(300, 2, 32)
    queries = random_codes(3, 2, 32, seed=1)
    if copies == 300:
        codes[1::2] = codes[1]
        codes[0::2] = codes[0]
    else:
        codes[:: 300 // copies] = queries[0]  # the most similar, copied
        codes[1 :: 300 // copies] = -queries[0]
    result = check(make(codes, mode), codes, queries, 10)
    if mode != "raw":
        assert list(result.most_ids[0, 0][:2]) == sorted(result.most_ids[0, 0][:2])


@pytest.mark.parametrize("mode", ["cosine", "centred"])
def test_near_ties_beyond_float32_are_ordered_by_their_exact_score(make, mode):
    """Codes that differ by their last bits: float32 products could not order them."""
    rng = np.random.default_rng(3)
    codes = random_codes(400, 1, 256)
    base = codes[0].copy()
    for i in range(60):
        codes[i] = base
        codes[i, 0, rng.integers(0, 256, 3)] *= np.float32(1 + 2e-7)
    gallery = make(codes, mode)
    result = gallery.search(base[None], 20)
    x = codes.astype(np.longdouble)[:, 0]
    q = base.astype(np.longdouble)[0]
    mean = gallery.mean[0].astype(np.longdouble) if mode == "centred" else 0
    x, q = x - mean, q - mean
    score = (x @ q) / np.sqrt((x * x).sum(1)) / np.sqrt(q @ q)
    found = [list(gallery.ids).index(i) for i in result.most_ids[0, 0]]
    assert all(i < 60 for i in found)
    # In order, and nothing better was left out, at 40 times float64's resolution.
    assert (np.diff(score[found]) <= 1e-14).all()
    assert np.delete(score, found).max() <= score[found[-1]] + 1e-14


def test_codes_close_to_the_mean_are_found_exactly(make, blocks):
    """Their float32 score is mostly rounding error in ``centred``, so they take another way."""
    codes = random_codes(500, 2, 64) + 3.0
    rng = np.random.default_rng(0)
    near = rng.normal(size=(10, 2, 64)) * 1e-3
    mean = np.delete(codes, np.s_[::50], axis=0).mean(axis=0, dtype=np.float64)
    codes[::50] = mean + near - near.mean(axis=0)  # so that the mean stays where it is
    gallery = make(codes)
    wild = int((gallery._exact._wild >= 0).sum())
    assert wild == 20
    # Queries that look in the direction of such a code find it first, and once.
    towards = mean + 5 * (codes[:200:50] - mean)
    queries = np.concatenate([random_codes(4, 2, 64, seed=1) + 3.0, towards]).astype(np.float32)
    mask = rng.random((8, 500)) < 0.3
    mask[4:, :200:50] = np.eye(4, dtype=bool)[[0, 2, 1, 3]]  # two of the four may not be found
    result = check(gallery, codes, queries, 12, mask, exclude_mask=mask)
    assert [result.most_ids[4 + i, 0, 0] == gallery.ids[50 * i] for i in range(4)] == [False, True, True, False]
    opposite = (2 * mean - queries[4:]).astype(np.float32)
    result = check(gallery, codes, opposite, 12, mask[4:], exclude_mask=mask[4:])
    assert [result.least_ids[i, 0] == gallery.ids[50 * i] for i in range(4)] == [False, True, True, False]


def test_all_modes_rank_differently(make):
    """Otherwise the tests of modes would show nothing."""
    codes, queries = random_codes(200, 1, 16), random_codes(5, 1, 16, seed=1)
    found = {mode: make(codes, mode, name=mode).search(queries, 5).most_ids.tolist() for mode in MODES}
    assert found["raw"] != found["cosine"] != found["centred"] != found["raw"]


def test_each_layer_is_searched_on_its_own(make):
    codes = random_codes(50, 4, 16)
    query = np.stack([codes[i, i] for i in range(4)])[None]  # layer i: the code of row i
    gallery = make(codes)
    assert list(gallery.search(query, 1).most_ids[0, :, 0]) == list(gallery.ids[:4])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_face_does_not_depend_on_its_batch(make, threads):
    codes, queries = random_codes(3000, 2, 128), random_codes(40, 2, 128, seed=1)
    gallery = make(codes)
    torch.set_num_threads(threads)
    try:
        together = gallery.search(queries, 7)
        for b in (0, 17, 39):
            for part in (slice(b, b + 1), slice(max(0, b - 5), b + 6)):
                alone, i = gallery.search(queries[part], 7), b - (part.start or 0)
                for name in ("most_ids", "most_scores", "least_ids", "least_scores"):
                    assert np.array_equal(getattr(alone, name)[i], getattr(together, name)[b]), name
    finally:
        torch.set_num_threads(1)


def test_the_order_of_the_store_does_not_matter(make):
    codes, queries = random_codes(300, 2, 32), random_codes(4, 2, 32, seed=1)
    codes[100:140] = codes[60:100]
    ids = [f"i{i:03d}" for i in range(300)]
    order = np.random.default_rng(0).permutation(300)
    a = make(codes, "cosine", ids=ids, name="a").search(queries, 30)
    b = make(codes[order], "cosine", ids=[ids[i] for i in order], name="b").search(queries, 30)
    assert np.array_equal(a.most_ids, b.most_ids) and np.array_equal(a.most_scores, b.most_scores)
    assert np.array_equal(a.least_ids, b.least_ids)


def test_exclusion_by_photo_and_person(make):
    codes, queries = random_codes(120, 2, 16), random_codes(4, 2, 16, seed=1)
    ids = [f"f{i}" for i in range(120)]
    photos = [f"photo{i // 2}" for i in range(120)]
    people = [f"person{i % 10}" if i % 3 else None for i in range(120)]
    gallery = make(codes, ids=ids, photo_ids=photos, person_ids=people)
    by_photo = [None, "photo3", ["photo4", "photo5", "nobody's"], []]
    by_person = ["person1", None, {"person2", "person3"}, "unknown"]
    excluded = np.zeros((4, 120), dtype=bool)
    for b in range(4):
        for i in range(120):
            photo, person = by_photo[b] or (), by_person[b] or ()
            excluded[b, i] = photos[i] in ([photo] if isinstance(photo, str) else photo)
            excluded[b, i] |= people[i] is not None and people[i] in ([person] if isinstance(person, str) else person)
    assert excluded.any(axis=1).tolist() == [True, True, True, False]
    check(gallery, codes, queries, 9, excluded, exclude_photo_ids=by_photo, exclude_person_ids=by_person)
    check(gallery, codes, queries, 9, excluded, exclude_mask=lambda b: excluded[b])
    # Excluding what was found gives the next ones: never fewer than k.
    first = gallery.search(queries, 5).most_ids[:, 0].tolist()
    photos_of = dict(zip(ids, photos, strict=True))
    second = gallery.search(queries, 5, exclude_photo_ids=[[photos_of[i] for i in row] for row in first])
    assert second.most_ids.shape == (4, 2, 5)
    assert not set(np.array(first).ravel()[:5]) & set(second.most_ids[0, 0])


def test_exclusion_by_identity_ceiling(make):
    codes, queries = random_codes(90, 1, 16), random_codes(3, 1, 16, seed=1)
    rng = np.random.default_rng(2)
    embeddings = rng.normal(size=(90, 8)).astype(np.float32) * 5
    faces = rng.normal(size=(3, 8)).astype(np.float32)
    gallery = make(codes, embeddings=embeddings)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosine = (faces / np.linalg.norm(faces, axis=1, keepdims=True)) @ unit.T
    excluded = cosine > 0.2
    assert 0 < excluded.sum() < excluded.size / 2
    check(gallery, codes, queries, 8, excluded, identity_embeddings=faces, identity_ceiling=0.2)
    with pytest.raises(QueryError, match="go together"):
        gallery.search(queries, 3, identity_ceiling=0.2)
    with pytest.raises(QueryError, match="no identity embeddings"):
        make(codes, name="bare").search(queries, 3, identity_embeddings=faces, identity_ceiling=0.2)


def test_too_few_codes_left(make):
    codes, queries = random_codes(20, 1, 8), random_codes(3, 1, 8, seed=1)
    gallery = make(codes)
    mask = np.zeros((3, 20), dtype=bool)
    mask[1, :15] = True
    gallery.search(queries, 5, exclude_mask=mask)
    with pytest.raises(NotEnoughCodesError, match="query 1: 6 codes wanted.* 20 and 15 of them") as error:
        gallery.search(queries, 6, exclude_mask=mask)
    assert (error.value.query, error.value.available, error.value.wanted) == (1, 5, 6)
    with pytest.raises(NotEnoughCodesError):
        gallery.search(queries, 21)
    with pytest.raises(NotEnoughCodesError):
        gallery.search(queries[:0], 21)


def test_empty_batch(make):
    gallery = make(random_codes(20, 3, 8))
    result = gallery.search(np.empty((0, 3, 8), np.float32), 4, exclude_photo_ids=[])
    assert result.most_ids.shape == (0, 3, 4) and result.most_vectors.shape == (0, 3, 4, 8)
    assert result.least_ids.shape == (0, 3) and result.least_vectors.shape == (0, 3, 8)


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("mode", MODES)
def test_broadcast_equals_the_written_out_gallery(make, mode, layers):
    codes, queries = random_codes(150, 1, 16), random_codes(3, layers, 16, seed=1)
    written_out = np.repeat(codes, layers, axis=1)
    compact = make(codes, mode, name="compact", broadcast_layers=layers)
    assert compact.num_layers == layers and compact.info.stored_layers == 1
    mask = np.random.default_rng(0).random((3, 150)) < 0.4
    check(compact, written_out, queries, 6, mask, exclude_mask=mask)
    full = make(written_out, mode, name="full")
    a, b = compact.search(queries, 6), full.search(queries, 6)
    for name in ("most_ids", "most_scores", "most_vectors", "least_ids", "least_scores", "least_vectors"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert np.array_equal(compact.codes(compact.ids[:4]), written_out[:4])
    np.testing.assert_array_equal(compact.component_std(), full.component_std())
    np.testing.assert_allclose(full.component_std(), written_out.astype(np.float64).std(axis=0), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("broadcast", [None, 2])
def test_faiss_agrees(make, mode, broadcast):
    codes, queries = random_codes(800, 1 if broadcast else 2, 64), random_codes(11, 2, 64, seed=1)
    gallery = make(codes, mode, broadcast_layers=broadcast)
    ours = gallery.search(queries, 10)
    most, most_scores, least, least_scores = faiss_search(gallery, queries, 10)
    assert (ours.most_ids == most).all() and (ours.least_ids == least).all()
    np.testing.assert_allclose(ours.most_scores, most_scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.least_scores, least_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q[:, :1], r"\(B, 2, 8\) float32"),
        (lambda q: q[0], r"\(B, 2, 8\) float32"),
        (lambda q: q.astype(np.float64), "float64"),
        (lambda q: q * np.float32([1, np.nan, 1])[:, None, None], "query 1: layer 0 has a NaN"),
    ],
)
def test_malformed_queries(make, change, message):
    with pytest.raises(QueryError, match=message):
        make(random_codes(20, 2, 8)).search(change(random_codes(3, 2, 8)), 2)


def test_malformed_options(make):
    gallery, queries = make(random_codes(20, 2, 8)), random_codes(3, 2, 8)
    for options in (
        {"k": 0},
        {"k": 2.0},
        {"k": True},
        {"k": 2, "exclude_photo_ids": ["a"]},
        {"k": 2, "exclude_photo_ids": "abc"},
        {"k": 2, "exclude_mask": np.zeros((3, 20))},
        {"k": 2, "exclude_mask": np.zeros((20, 3), dtype=bool)},
        {"k": 2, "exclude_mask": lambda b: np.zeros(19, dtype=bool)},
    ):
        with pytest.raises(QueryError):
            gallery.search(queries, **options)


def test_query_without_a_direction(make):
    codes = random_codes(20, 2, 8)
    gallery = make(codes)
    queries = random_codes(3, 2, 8, seed=1)
    queries[2, 1] = gallery.mean[1]
    with pytest.raises(QueryError, match="query 2: layer 1 equals the gallery's mean"):
        gallery.search(queries, 2)
    queries[2, 1] = 0
    with pytest.raises(QueryError, match="query 2: layer 1 equals zero"):
        make(codes, "cosine", name="c").search(queries, 2)


def test_lower_matmul_precision_changes_nothing(make):
    """Where a process allows TF32 or bfloat16 products the bound is wider, the answer the same."""
    codes, queries = random_codes(2000, 1, 256), random_codes(16, 1, 256, seed=1)
    gallery = make(codes)
    expected = gallery.search(queries, 10)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        slack = float(gallery._exact._slack)
        result = gallery.search(queries, 10)
    finally:
        torch.set_float32_matmul_precision(before)
    assert slack > 20 * float(gallery._exact._slack)
    assert np.array_equal(result.most_ids, expected.most_ids) and np.array_equal(result.least_ids, expected.least_ids)
    assert np.array_equal(result.most_scores, expected.most_scores)
