"""Compressed indexes beside the exact search, and what the tuner says."""

import numpy as np
import pytest

from gallery_index import CodeBatch, Gallery, GalleryCorruptError, GalleryError, Plan, Store, build, check, open_gallery
from gallery_index.tuning import Rates, choose, estimate, words
from tests.helpers.gallery_reference import random_codes

N, LAYERS, DIM = 1500, 2, 32
RATES = Rates(product=1e11, stream=3e10, disk=1e9)


def low_rank(n, seed=0):
    """Codes with most of their variance in a few directions, as W codes have."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(99).normal(size=(LAYERS, 8, DIM))
    codes = np.einsum("nlr,lrd->nld", rng.normal(size=(n, LAYERS, 8)), basis)
    return (codes + 0.3 * rng.normal(size=codes.shape) + 2.0).astype(np.float32)


@pytest.fixture(scope="module")
def codes():
    return low_rank(N)


def made(tmp_path, codes, plan, mode="centred", **options):
    ids = [f"i{i:05d}" for i in np.random.default_rng(7).permutation(len(codes))]
    build(tmp_path, [CodeBatch(codes, ids)], mode=mode, weights={}, compression=plan, **options)
    return Gallery.load(tmp_path, search="compressed"), Gallery.load(tmp_path)


def overlap(a, b):
    return np.mean([np.isin(x, y).mean() for x, y in zip(a.reshape(-1, 10), b.reshape(-1, 10), strict=True)])


@pytest.mark.parametrize(
    ("factory", "search", "mode"),
    [
        ("PCA16,IVF16,SQ8", "nprobe=16", "centred"),
        ("PCA16,IVF16,PQ8x4fs", "nprobe=16", "cosine"),
        ("IVF16,SQ8", "nprobe=16", "raw"),
        ("HNSW16", "efSearch=128", "centred"),
        ("SQ8", "", "centred"),
    ],
)
def test_both_ends_and_exclusions(tmp_path, codes, factory, search, mode):
    small, full = made(tmp_path, codes, Plan(factory, search, 200, N), mode)
    queries = low_rank(8, seed=1)
    for found, truth in zip(small.rank(queries, 10, 10), full.rank(queries, 10, 10), strict=True):
        assert overlap(found, truth) > 0.9
    # What is found has its exact score and the exact search's order.
    a, b = small.search(queries, 10), full.search(queries, 10)
    for i, layer in np.ndindex(8, LAYERS):
        exact = dict(zip(b.most_ids[i, layer], b.most_scores[i, layer], strict=True))
        assert all(exact.get(id_, s) == s for id_, s in zip(a.most_ids[i, layer], a.most_scores[i, layer], strict=True))
    rng = np.random.default_rng(3)
    for share in (0.01, 0.7, 0.99):  # few, many, nearly all: what may not be found never is, and k are found
        mask = rng.random((8, N)) < share
        mask[:, :12] = False
        got = small.search(queries, 10, exclude_mask=mask)
        row = {id_: i for i, id_ in enumerate(small.ids)}
        assert not any(mask[b, row[id_]] for b in range(8) for id_ in [*got.most_ids[b].ravel(), *got.least_ids[b]])
        assert all(len(set(ids)) == 10 for ids in got.most_ids.reshape(-1, 10))
        if share > 0.9:
            assert overlap(got.most_ids, full.search(queries, 10, exclude_mask=mask).most_ids) > 0.8


def test_broadcast_vectors_and_check(tmp_path, codes):
    plan = Plan("IVF8,SQ8", "nprobe=8", 100, N)
    small, full = made(tmp_path, codes[:, :1], plan, broadcast_layers=4)
    queries = np.repeat(low_rank(3, seed=2)[:, :1], 4, axis=1)
    a, b = small.search(queries, 5), full.search(queries, 5)
    assert (a.most_ids == b.most_ids).mean() > 0.9 and a.most_vectors.shape == (3, 4, 5, DIM)
    np.testing.assert_array_equal(small.codes(a.most_ids[:, 0, 0]), np.repeat(a.most_vectors[:, :1, 0], 4, axis=1))
    np.testing.assert_array_equal(small.component_std(), full.component_std())
    report = check(*open_gallery(tmp_path))
    assert report["recall_most"] > 0.9 and report["recall_least"] > 0.9


def test_refusals(tmp_path, codes):
    small, _ = made(tmp_path / "g", codes, Plan("IVF8,SQ8", "nprobe=8", 50, N))
    path = tmp_path / "g" / small.info.exact[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(GalleryCorruptError, match="sha256"):
        Gallery.load(tmp_path / "g", search="compressed")
    build(tmp_path / "plain", [CodeBatch(codes, [f"i{i}" for i in range(N)])], weights={})
    with pytest.raises(GalleryError, match="no compressed indexes"):
        Gallery.load(tmp_path / "plain", search="compressed")
    with pytest.raises(ValueError, match="exact, compressed"):
        Gallery.load(tmp_path / "plain", search="fast")


def test_updates_keep_the_plan(tmp_path, codes):
    """Indexes are trained anew, so nothing of removed people is left in them; a layer that is there is used again."""
    store, plan = Store(tmp_path), Plan("IVF8,SQ8", "nprobe=8", 50, N)
    ids = [f"i{i}" for i in range(N)]
    store.build("a", lambda b: b.add(CodeBatch(codes, ids)), weights={}, compression=plan, check=check)
    store.removed.add(ids=["i3"])
    done = store.update("remove", check=check)
    assert done.info.compression == plan.as_json() and done.info.count == N - 1
    small = Gallery.load(tmp_path, search="compressed")
    assert "i3" not in small.search(codes[3:4], 10).most_ids
    store.prune(keep=0)
    needle = codes[3, 1].tobytes()
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and needle in p.read_bytes()]


def test_the_tuner():
    small = estimate(20_000, 16, rates=RATES, memory=2 * 10**9)
    assert small.plan is None and small.recall == 1 and 0.65e9 < small.memory_bytes < 1e9
    large = estimate(10**6, 16, rates=RATES, memory=8 * 10**9)
    assert large.plan.factory == "PCA64,IVF4096,SQ8" and large.memory_bytes < 8e9 < large.disk_bytes
    assert large.search_seconds < estimate(10**6, 16, rates=RATES).search_seconds / 5
    tight = estimate(10**6, 16, rates=RATES, memory=10**9)
    assert "PQ" in tight.plan.factory and tight.memory_bytes < large.memory_bytes
    probes = [int(choose(10**6, recall=r).search.removeprefix("nprobe=")) for r in (0.8, 0.9, 0.95, 0.99)]
    assert probes == sorted(set(probes))
    assert all(words(large).values())
    for wrong in (dict(count=0, layers=1), dict(count=10, layers=0), dict(count=10**6, layers=16, memory=10**6)):
        with pytest.raises(ValueError):
            estimate(**wrong, rates=RATES)
    with pytest.raises(ValueError, match="recall"):
        choose(1000, recall=1.5)
    assert Rates.measure(2000, 64).product > 0


@pytest.mark.parametrize("count", [30, 3000, 60_000])
def test_every_choice_can_be_built(tmp_path, count):
    """The tuner's plan for few and for more codes works as it stands."""
    codes = random_codes(min(count, 3000), 1, 128)
    plan = choose(count, 128)
    if count > len(codes):  # as many lists as so few codes can fill
        plan = Plan(plan.factory.replace("IVF1024", "IVF16"), "nprobe=16", plan.candidates, 1000)
    small, full = made(tmp_path, codes, plan)
    assert overlap(*(gallery.rank(codes[:4], 10, 10)[0] for gallery in (small, full))) > 0.5  # no low rank here
