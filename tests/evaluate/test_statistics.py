import numpy as np
import pytest

from pipelines.evaluate.statistics import ClusterBootstrap, Distribution


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
