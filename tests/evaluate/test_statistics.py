import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines.evaluate.measure import OTHER, Settings, face_schema
from pipelines.evaluate.statistics import ClusterBootstrap, Distribution
from pipelines.evaluate.summary import AVERAGE, PROTECTED, Collector, Judge, Summary, clusters, thresholds
from scol_ops.distortions import NONE


def run(values: np.ndarray, people: list[str], pieces: int = 1, resamples: int = 4000) -> dict:
    boot = ClusterBootstrap([str(i) for i in range(values.shape[1])], len(set(people)), resamples)
    names = sorted(set(people))
    for some in np.array_split(np.array(names), pieces):
        rows = [i for i, p in enumerate(people) if p in set(some)]
        boot.add([people[i] for i in rows], values[rows])
    return boot.estimates()


def test_means_and_missing_values_by_hand():
    values = np.array([[1.0, np.nan, np.nan], [0.0, 4.0, np.nan], [0.0, 6.0, np.nan]])
    got = run(values, ["a", "a", "b"])
    assert got["0"].value == pytest.approx(1 / 3) and got["0"].n == 3
    assert got["1"].value == 5 and got["1"].n == 2 and got["2"] is None
    assert (got["0"].people, got["1"].people) == (2, 2)
    # Of fifty people one alone has the quantity: however many faces, there is nothing to draw.
    lonely = run(np.array([[1.0], [1.0], [0.0], *[[np.nan]] * 49]), ["a", "a", "a", *(f"p{i}" for i in range(49))])["0"]
    assert (lonely.n, lonely.people, lonely.low, lonely.high) == (3, 1, None, None)
    assert lonely.value == pytest.approx(2 / 3)
    alone = run(values[:2], ["a", "a"])["0"]
    assert alone.value == 0.5 and alone.low is None


@pytest.mark.parametrize("pieces", [1, 7])
def test_the_interval_is_that_of_the_mean(pieces):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((600, 1))
    people = [f"p{i:03d}" for i in range(600)]
    got = run(values, people, pieces)["0"]
    half = 1.96 * values.std() / np.sqrt(600)
    assert got.high - got.value == pytest.approx(half, rel=0.1) and got.value - got.low == pytest.approx(half, rel=0.1)


def test_people_are_drawn_and_not_faces():
    """Ten faces each that say the same: as wide as one face each."""
    rng = np.random.default_rng(1)
    of_person = rng.integers(0, 2, 80).astype(float)
    people = [f"p{i:02d}" for i in range(80)]
    one = run(of_person[:, None], people)["0"]
    ten = run(np.repeat(of_person, 10)[:, None], [p for p in people for _ in range(10)])["0"]
    assert ten.value == one.value and ten.high - ten.low == pytest.approx(one.high - one.low, rel=0.1)


def test_the_promise_of_people_is_kept():
    boot = ClusterBootstrap(["a"], 2)
    boot.add(["x"], np.ones((1, 1)))
    with pytest.raises(ValueError, match="missing"):
        boot.estimates()
    with pytest.raises(ValueError, match="more than"):
        boot.add(["y", "z"], np.ones((2, 1)))
    with pytest.raises(ValueError):
        boot.add(["y"], np.ones((1, 2)))


def test_quantiles_to_a_bin():
    rng = np.random.default_rng(2)
    values = rng.random(5000)
    found = Distribution(0, 1, 1000)
    for part in np.array_split(values, 3):
        found.add(part)
    found.add(np.array([np.nan, np.inf]))
    for share in (0.05, 0.5, 0.95):
        assert found.quantile(share) == pytest.approx(np.quantile(values, share), abs=0.002)
    assert found.to_dict()["n"] == 5000 and found.infinite == 1
    counts, edges = found.coarse(20)
    assert counts.sum() == 5000 and len(edges) == len(counts) + 1 <= 22 and np.all(np.diff(edges) > 0)
    assert Distribution(0, 1).quantile(0.5) is None


def collected(gallery: int, rows: list[dict]) -> tuple[Summary, dict]:
    """Two recognisers, the second used inside; rows say what differs from a face that is found everywhere."""
    settings = Settings(("one", "two"), ("half",), photo=True)
    judges = [
        Judge("one", "w", 0.5, {1e-2: 0.6, 1e-3: 0.8}, 5000, False),
        Judge("two", "w", 0.5, {1e-2: 0.1, 1e-3: None}, 500, True),
    ]
    schema = face_schema(settings)
    common = {"key": "k", "photo_id": "p", "path": "p.jpg", "url": "u", "status": "ok", "has_mate": True}
    table = pa.Table.from_pylist([common | row for row in rows], schema)
    collector = Collector(settings, judges, len(set(clusters(table.filter(pc.equal(table["status"], "ok"))))), gallery)
    collector.add(table)
    summary = collector.summary()
    return summary, summary.identity["one"][PROTECTED][NONE]


def test_rates_by_hand():
    people = ["a", "b", "c", "d"]
    rows = [
        {
            "face_id": f"{person}-00",
            "photo_id": person,
            "person_id": person,
            "ism_one": ism,
            "mate_one": mate,
            "rank_one": rank,
            "ism_two": 0.9,
            "rank_two": 9,
            "ism_one@half": 0.05,
        }
        for person, ism, mate, rank in zip(
            people, (0.9, 0.7, 0.55, 0.2), (0.7, 0.55, 0.4, 0.9), (1, 2, 6, 5), strict=True
        )
    ]
    summary, cell = collected(20, rows)
    assert {k: v.value for k, v in cell.items()} == pytest.approx(
        {
            "ism": np.mean([0.9, 0.7, 0.55, 0.2]),
            "mate": np.mean([0.7, 0.55, 0.4, 0.9]),
            "rank1_u": 3 / 4,
            "rank5_u": 1 / 4,
            "verified_own_1e-2": 2 / 4,
            "verified_mate_1e-2": 2 / 4,
            "verified_own_1e-3": 1 / 4,
            "verified_mate_1e-3": 1 / 4,
            "accepted_own": 3 / 4,
            "accepted_mate": 3 / 4,
        },
        abs=1e-6,
    )
    # The recogniser inside counts in no average, and has no threshold at one in a thousand.
    assert summary.identity[AVERAGE] == summary.identity["one"]
    inside = summary.identity["two"][PROTECTED][NONE]
    assert inside["verified_own_1e-3"] is None and inside["verified_own_1e-2"].value == 1
    assert summary.distributions["ism_one@half"].quantile(0.5) == pytest.approx(0.05, abs=0.001)


def test_rank_k_needs_k_others():
    row = {"face_id": "a-00", "person_id": "a", "rank_one": 2, "other_rank_one": 2}
    for gallery, rank1, rank5 in ((6, 1, 0), (5, 1, None), (2, 1, None), (1, None, None)):
        _, cell = collected(gallery, [row])
        assert tuple(cell[k] and cell[k].value for k in ("rank1_u", "rank5_u")) == (rank1, rank5)
    other = collected(2, [row])[0].identity["one"][OTHER][NONE]
    assert other["rank1_u"] is None  # somebody else's photo has nobody left to be mistaken for


def test_a_photos_own_figures_count_once_whatever_became_of_its_first_face():
    rows = [
        {"face_id": "p-00", "status": "error", "reason": "GEOMETRY: flat"},
        {"face_id": "p-01", "photo_psnr": 30.0},
        {"face_id": "p-02", "photo_psnr": 30.0},
        {"face_id": "q-00", "photo_id": "q", "photo_psnr": 40.0},
    ]
    found = collected(9, rows)[0].picture["photo_psnr"][NONE]
    assert (found.value, found.n) == (35.0, 2)


def test_thresholds_come_from_pairs_of_different_people():
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((60, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    found, pairs = thresholds(vectors)
    scores = (vectors @ vectors.T)[np.triu_indices(60, 1)]
    assert pairs == len(scores) == 1770
    for far in (1e-2, 1e-3):
        assert (scores > found[far]).mean() <= far < (scores >= found[far] - 0.02).mean()
    assert thresholds(vectors[:20])[0] == {1e-2: pytest.approx(found[1e-2], abs=0.2), 1e-3: None}
