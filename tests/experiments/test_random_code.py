"""`fuse.source = random`: a code of other people, drawn by the face's seed, in place of the similar ones.
`fuse.target = random`: the same in place of the least similar ones."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from gallery_index import CodeBatch, Gallery, build
from pipelines.config.load import ConfigError, load_config
from pipelines.stages import fuse
from pipelines.stages.rows import to_table
from scol_ops.fusion import draw_code

PHOTOS, LAYERS = 12, 16


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> str:
    """A gallery of photos: two photos of each person."""
    url = str(tmp_path_factory.mktemp("gallery") / "g")
    codes = np.random.default_rng(0).normal(size=(PHOTOS, LAYERS, 512)).astype(np.float32)
    photos = [f"photo{i:02d}" for i in range(PHOTOS)]
    batch = CodeBatch(codes, photos, [f"person{i // 2}" for i in range(PHOTOS)], [f"{p}-00" for p in photos])
    build(url, [batch], mode="centred", weights={})
    return url


def table(place: str, seeds: list[int]) -> pa.Table:
    gallery = Gallery.load(place)
    rows = [
        {
            "key": f"k{i}",
            "photo_id": f"photo{i:02d}",
            "face_id": f"photo{i:02d}-00",
            "status": "ok",
            "seed": seed,
            "code": gallery.codes([f"photo{i:02d}-00"])[0].reshape(-1) + np.float32(0.01),
        }
        for i, seed in enumerate(seeds)
    ]
    people = pa.array([f"person{i // 2}" for i in range(len(rows))])
    return to_table("invert", rows).append_column("source.person_id", people)


def fused(place: str, seeds: list[int], *sets: str) -> list[dict]:
    return fuse.operator(load_config("quick", sets=["fuse.k=3", *sets]), "w", place)(table(place, seeds)).to_pylist()


def test_a_whole_code_of_somebody_else(place):
    gallery = Gallery.load(place)
    drawn = set()
    for first in range(0, 60, 6):
        for i, row in enumerate(fused(place, list(range(first, first + 6)), "fuse.source=random")):
            (name,) = row["most_ids"]
            assert row["status"] == "ok" and name not in (f"photo{i - i % 2:02d}-00", f"photo{i - i % 2 + 1:02d}-00")
            assert np.array_equal(np.float32(row["fused"]), gallery.codes([name])[0].reshape(-1))
            assert len(row["most_scores"]) == 1 and -1 <= row["most_scores"][0] <= 1
            drawn.add(name)
    assert len(drawn) > 8  # any of the twelve


def test_the_seed_draws_and_the_target_stays(place):
    once, again, other = (fused(place, [s] * 6, "fuse.source=random") for s in (4, 4, 5))
    assert [r["most_ids"] for r in once] == [r["most_ids"] for r in again] != [r["most_ids"] for r in other]
    similar = fused(place, [4] * 6)
    assert [r["target"] for r in once] == [r["target"] for r in similar]
    assert all(len(r["most_ids"]) == 3 for r in similar)


def test_a_target_drawn_is_another_than_the_code_drawn(place):
    gallery = Gallery.load(place)
    codes = {name: gallery.codes([name])[0].reshape(-1) for name in (f"photo{n:02d}-00" for n in range(PHOTOS))}
    seeds = list(range(6))
    similar, both = fused(place, seeds), fused(place, seeds, "fuse.target=random", "fuse.source=random")
    targets = []
    for i, row in enumerate(fused(place, seeds, "fuse.target=random")):
        (name,) = (n for n, code in codes.items() if np.array_equal(np.float32(row["target"]), code))
        assert name not in (f"photo{i - i % 2:02d}-00", f"photo{i - i % 2 + 1:02d}-00")
        assert row["most_ids"] == similar[i]["most_ids"] and row["fused"] == similar[i]["fused"]
        assert row["least_scores"] != similar[i]["least_scores"] and len(row["least_scores"]) == LAYERS
        assert row["target"] == both[i]["target"]
        targets.append(name)
    assert len(set(targets)) > 2 and targets != [row["most_ids"][0] for row in both]


@pytest.mark.parametrize(("setting", "default"), [("source", "similar"), ("target", "least")])
def test_settings(setting, default):
    plain, random = load_config("quick"), load_config("quick", sets=[f"fuse.{setting}=random"])
    assert getattr(plain.fuse, setting) == default
    assert setting not in plain.stage_config("fuse")["fuse"]  # runs from before it was a setting keep their keys
    assert random.stage_config("fuse")["fuse"][setting] == "random"
    with pytest.raises(ConfigError, match=f"fuse.{setting}: random needs gallery.search = exact"):
        load_config("quick", sets=[f"fuse.{setting}=random", "gallery.search=compressed", "gallery.url=x"])


def test_a_ceiling_does_not_go_with_a_code_drawn():
    with pytest.raises(ConfigError, match="does not look at it"):
        load_config("quick", sets=["fuse.source=random", "fuse.identity_ceiling=0.2", "gallery.url=x"])


def test_draw_by_hand():
    allowed = np.array([False, True, False, True])
    assert {draw_code(allowed, seed) for seed in range(50)} == {1, 3}
    assert draw_code(allowed, 7) == draw_code(allowed, 7)
    with pytest.raises(ValueError, match="no code"):
        draw_code(np.zeros(3, bool), 0)
