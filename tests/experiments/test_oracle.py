"""Swaps by the embedded oracle: a tree of them, what is made again, and what DSR says of them."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from pipelines.experiments import tables
from pipelines.experiments.comparison import UNPROTECTED, Line
from pipelines.experiments.methods import Made, Method
from pipelines.experiments.oracle import Oracle, make_swaps
from pipelines.jobs.demo import draw_person

SEEDS = {"Ada": 15, "Ben": 10, "Cleo": 13}


def write(path, person: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_person(person, 0, 256)).save(path)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def test_a_tree_of_swaps(tmp_path, oracle):
    for person, seed in SEEDS.items():
        write(tmp_path / f"originals/{person}/0.jpg", seed)
        write(tmp_path / f"trees/tau-3/{person}/0.jpg", 100 + seed)  # everybody has become another person
    Image.new("RGB", (200, 200), "grey").save(tmp_path / "trees/tau-3/Cleo/0.jpg")  # nobody
    made = make_swaps(oracle, tmp_path / "originals", tmp_path / "swaps/original")
    assert (made.swaps, made.made, made.failed) == (3, 3, {})
    with Image.open(tmp_path / "swaps/original/Ada/0.png") as first:
        assert first.size == (256, 256)
    lines = [
        Line(UNPROTECTED, Made(str(tmp_path / "originals"), None), {}),
        Line(
            Method("tau-3", "ours", "quick", ("tune.identity=mobilefacenet", "refine.identity=mobilefacenet")),
            Made(str(tmp_path / "trees/tau-3"), 1.0),
            {},
        ),
    ]
    heard: list[str] = []
    found = tables.swaps_by_oracle(lines, tmp_path / "originals", tmp_path / "swaps", 0, heard.append)["tau-3"]
    assert "original: 3 swaps, 0 made now" in heard[0] and "tau-3: 2 swaps, 2 made now, 1 sources cannot" in heard[1]
    assert found.swapper == tables.ORACLE and (found.sources, found.missing) == (2, 1)
    # The oracle's own eye does not judge.  The originals' swaps show them, the others' do not.
    assert "mobilefacenet" not in found.dsr and found.without["faceres"] < found.dsr["faceres"]
    assert 5 < found.deepfake_psnr < 40


def test_swaps_follow_their_sources(tmp_path, oracle):
    for person in ("Ada", "Ben"):
        write(tmp_path / f"sources/{person}/0.png", SEEDS[person])
    make_swaps(oracle, tmp_path / "sources", tmp_path / "swaps")
    before = {p: (tmp_path / f"swaps/{p}/0.png").read_bytes() for p in ("Ada", "Ben")}
    write(tmp_path / "sources/Ada/0.png", SEEDS["Cleo"])
    (tmp_path / "sources/Ben/0.png").unlink()
    made = make_swaps(oracle, tmp_path / "sources", tmp_path / "swaps")
    assert (made.swaps, made.made) == (1, 1) and not (tmp_path / "swaps/Ben/0.png").exists()
    assert (tmp_path / "swaps/Ada/0.png").read_bytes() != before["Ada"]
    assert list(json.loads((tmp_path / "swaps.json").read_text())) == ["Ada/0"]
    # A run that stopped half way left a file that nobody remembers: it is neither kept nor measured.
    write(tmp_path / "swaps/Eve/0.png", SEEDS["Cleo"])
    made = make_swaps(oracle, tmp_path / "sources", tmp_path / "swaps")
    assert (made.swaps, made.made) == (1, 0) and not (tmp_path / "swaps/Eve/0.png").exists()
    # Another source, the same target; another name, another one.
    ada = oracle.target("Ada/0")
    assert not ada.equal(oracle.target("Ben/0")) and ada.equal(Oracle().target("Ada/0"))
