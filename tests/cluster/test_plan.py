"""What can be told before any worker starts: plans, contracts, and how pools are laid out."""

import itertools
from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from cluster import (
    ContractError,
    Engine,
    PartStore,
    PlanError,
    Pool,
    Resources,
    Stage,
    UnsafeStoreError,
    hash_key,
    hash_keys,
)
from cluster.keys import KeyIndex, distinct, pack, unpack
from cluster.layout import size_pools
from cluster.session import usable_cpus
from cluster.store import INDEX
from tests.helpers.arithmetic import PARTS, VERSIONS, chain, failed_parts, make_square, source_table, stages


def test_a_plan_says_what_is_missing_and_starts_nothing(tmp_path):
    import ray

    connected = ray.is_initialized()
    store = PartStore(tmp_path)
    source = source_table(["ok"] * 5)
    keys = chain(source, VERSIONS)
    done = pa.table({"key": keys["split"][1:3], "status": ["ok"] * 2, "reason": pa.nulls(2, pa.string())})
    store.write_part("split", None, done)
    plan = Engine(store, stages()).plan(source, keys)
    assert plan.missing() == {"source": 5, "split": 3, "square": 5, "total": 5}
    assert plan.parts_of(1, [1, 2]) == store.parts("split")
    assert ray.is_initialized() == connected


def test_a_run_with_nothing_to_do_needs_no_ray(tmp_path):
    import ray

    connected = ray.is_initialized()
    source = source_table([])
    summary = Engine(PartStore(tmp_path), stages(), address="nowhere:1").run(source, chain(source, VERSIONS))
    assert summary.to_dict()["stages"]["total"]["total"] == 0
    assert ray.is_initialized() == connected


@pytest.mark.parametrize(
    "spoil",
    [
        lambda keys: keys.pop("square"),
        lambda keys: keys["square"].pop(),
        lambda keys: keys["square"].__setitem__(0, None),
        lambda keys: keys["square"].__setitem__(0, keys["square"][1]),
        lambda keys: keys.__setitem__("square", list(range(5))),
    ],
    ids=["no stage", "too few", "null", "doubled", "numbers"],
)
def test_inconsistent_keys_are_refused(tmp_path, spoil):
    source = source_table(["ok"] * 5)
    keys = chain(source, VERSIONS)
    spoil(keys)
    with pytest.raises(PlanError):
        Engine(PartStore(tmp_path), stages()).plan(source, keys)


def stage(name="a", schema=PARTS, **settings):
    return Stage(name, "1", schema, make_square, failed_parts, **settings)


@pytest.mark.parametrize(
    "make",
    [
        lambda store: stage(schema=pa.schema([("key", pa.string()), ("status", pa.string())])),
        lambda store: stage(schema=pa.schema([(n, pa.large_string()) for n in ("key", "status", "reason")])),
        lambda store: stage(batch_items=0),
        lambda store: stage(shard_items=0),
        lambda store: stage(item_seconds=0.0),
        lambda store: Engine(store, []),
        lambda store: Engine(store, [stage("a"), stage("a")]),
        lambda store: Engine(store, [stage("source")]),
        lambda store: Engine(store, [stage("a", joins={"b": ["value"]}), stage("b")]),
        lambda store: Engine(store, [stage("a"), stage("b", joins={"a": ["nonesuch"]})]),
        lambda store: Engine(store, [stage("a"), stage("b", columns=["nonesuch"])]),
        lambda store: Engine(store, [stage("a")], pools={"other": Pool()}),
        lambda store: Engine(store, [stage("a")], shard_items=0),
    ],
)
def test_wrong_declarations_are_refused_at_once(tmp_path, make):
    with pytest.raises(ContractError):
        make(PartStore(tmp_path))


def test_a_store_that_workers_cannot_see_is_refused():
    with pytest.raises(UnsafeStoreError):
        Engine(PartStore("memory://x"), stages())


def node(cpus, gpus=0.0, memory=64e9):
    return {"CPU": cpus, "GPU": gpus, "memory": memory}


def layout(wanted, nodes, settings=None):
    sizes = size_pools(wanted, settings or {}, nodes)
    return {name: (s.actors, s.num_cpus, s.num_gpus, s.threads) for name, s in sizes.items()}


def test_one_pool_on_cores_fills_the_machine():
    assert layout({"a": Resources()}, [node(2)]) == {"a": (1, 2, 0, 2)}
    assert layout({"a": Resources()}, [node(16)]) == {"a": (4, 4, 0, 4)}
    assert layout({"a": Resources(threads=1)}, [node(16)]) == {"a": (16, 1, 0, 1)}
    assert layout({"a": Resources(threads=1)}, [node(16)], {"a": Pool(actors=3)}) == {"a": (3, 1, 0, 1)}


def test_a_pool_that_wishes_for_gpus_gets_one_actor_each_or_cores():
    wanted = {"net": Resources(num_gpus=1), "io": Resources(threads=1)}
    assert layout(wanted, [node(16, 2)])["net"][::2] == (2, 1)
    assert layout(wanted, [node(4)])["net"][2] == 0
    assert layout({"a": Resources(num_gpus=0.25)}, [node(16, 1)])["a"][::2] == (4, 0.25)


def test_memory_bounds_the_actors():
    assert layout({"a": Resources(threads=1, memory=int(20e9))}, [node(16)])["a"][0] == 3


@pytest.mark.parametrize("cpus, gpus", list(itertools.product([1, 2, 3, 64], [0, 1, 3])))
@pytest.mark.parametrize("pools", [1, 2, 5])
def test_all_pools_fit_at_the_same_time(cpus, gpus, pools):
    """Or Ray would keep one waiting for ever while the engine waits for it."""
    wanted = {str(i): Resources(num_cpus=4, num_gpus=i % 2, threads=2) for i in range(pools)}
    sizes = size_pools(wanted, {"0": Pool(actors=7)}, [node(cpus, gpus)])
    assert sizes.keys() == wanted.keys()
    assert all(size.actors >= 1 and size.threads == 2 for size in sizes.values())
    assert sum(size.actors * size.num_cpus for size in sizes.values()) <= cpus + 1e-9
    assert sum(size.actors * size.num_gpus for size in sizes.values()) <= gpus + 1e-9
    for size in sizes.values():
        assert size.num_cpus > 0 and (size.num_gpus < 1 or size.num_gpus == int(size.num_gpus))


@pytest.mark.parametrize(
    "files, cores",
    [
        ({"cpu.max": "150000 100000"}, 1),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu.max": "1000 100000"}, 1),
        ({}, 8),
    ],
)
def test_a_containers_quota_bounds_the_cores(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name, words in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(words + "\n")
    assert usable_cpus(str(tmp_path)) == cores


def windows_of(source, size):
    return (source.slice(first, size) for first in range(0, source.num_rows, size))


def rules(versions):
    """The rules by which `chain` makes keys."""
    return {name: partial(hash_keys, [name, version]) for name, version in versions.items()}


def test_a_listing_in_pieces_and_rules_for_keys_plan_as_a_table_and_columns_do(tmp_path):
    store = PartStore(tmp_path)
    source = source_table(["ok"] * 50)
    keys = chain(source, VERSIONS)
    for stage, items in (("split", range(7)), ("split", range(30, 40)), ("total", [3, 49]), ("source", range(5))):
        column = keys[stage] if stage in keys else source["key"].to_pylist()
        store.write_part(stage, None, pa.table({"key": [column[i] for i in items]}))
    engine = Engine(store, stages())
    whole = engine.plan(source, keys)
    pieces = engine.plan(windows_of(source, 13), rules(VERSIONS))
    assert whole.missing() == pieces.missing() == {"source": 45, "split": 33, "square": 50, "total": 48}
    for stage in range(4):
        assert whole.names[stage] == pieces.names[stage]
        assert whole.part[stage].tolist() == pieces.part[stage].tolist()
        assert whole.keys_of(stage, [49, 0, 7]) == pieces.keys_of(stage, [49, 0, 7])
    mixed = engine.plan(source, {**keys, "square": rules(VERSIONS)["square"]})
    assert mixed.keys_of(2, [1]) == [keys["square"][1]] and mixed.missing() == whole.missing()
    assert not (tmp_path / "source" / INDEX).exists()  # a plan leaves the store as it is


@pytest.mark.parametrize("key", ["x" * 32, "A" * 32, "0" * 31 + " ", "0" * 31, ""])
def test_keys_of_another_form_are_refused(tmp_path, key):
    source = source_table(["ok"] * 5)
    keys = chain(source, VERSIONS)
    keys["split"][2] = key
    with pytest.raises(PlanError, match="32 hex digits"):
        Engine(PartStore(tmp_path), stages()).plan(source, keys)


def test_an_item_listed_twice_in_two_pieces_is_refused(tmp_path):
    source = source_table(["ok"] * 5)
    with pytest.raises(PlanError, match="same key"):
        Engine(PartStore(tmp_path), stages()).plan([source, source.slice(2, 1)], rules(VERSIONS))


def test_hashing_many_keys_is_hashing_each():
    keys = [hash_key(n) for n in range(5)]
    assert hash_keys(["s", 1, b"x"], keys) == [hash_key("s", 1, b"x", key) for key in keys]
    assert hash_keys(["s"], []) == []
    with pytest.raises(ValueError, match="lengths"):
        hash_keys(["s"], ["a", "bc"])


def test_keys_survive_packing_and_are_found():
    keys = [hash_key(n) for n in range(100)] + ["0" * 32, "f" * 32]
    assert unpack(pack(keys)) == unpack(pack(pa.array(keys))) == keys
    index = KeyIndex(pack(keys[::2]), np.arange(51, dtype=np.int32), [str(i) for i in range(51)])
    assert index.find(pack(keys)).tolist() == [i // 2 if i % 2 == 0 else -1 for i in range(102)]
    # keys that share their first half, and keys in several parts
    twins = ["a" * 16 + end * 16 for end in "0123"]
    index = KeyIndex(pack([*twins[:3], *twins[1:3], keys[0]]), np.array([5, 6, 7, 2, 9, 1], np.int32), [])
    assert index.find(pack([*twins, keys[0], keys[1]])).tolist() == [5, 2, 7, -1, 1, -1]
    assert sorted(unpack(index.packed)) == sorted([*twins[:3], keys[0]])
    assert distinct(pack(twins)) and not distinct(pack([*twins, twins[1]])) and distinct(pack([]))
