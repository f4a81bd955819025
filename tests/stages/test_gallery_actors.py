"""A gallery on actors: the single process's answers, also after an actor was killed."""

import os
import signal

import numpy as np
import pytest
import ray

from cluster import Service
from cluster.errors import EngineError
from gallery_index import CodeBatch, Gallery, GalleryMismatchError, build
from gallery_index.info import Expectation
from pipelines.stages import gallery_actors as gallery_service


def _process(part: int):
    if part == 7:
        raise ValueError("no such part")
    return lambda request: (part, request, os.getpid())


def test_parts_on_actors(ray_cluster, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(200, 4, 32)).astype(np.float32)
    ids = [f"i{i:03d}" for i in range(200)]
    build(tmp_path / "g", [CodeBatch(codes, ids)], weights={})
    whole = Gallery.load(tmp_path / "g")
    queries = rng.normal(size=(5, 4, 32)).astype(np.float32)
    services: list[Service] = []
    original = Service.__init__

    def kept(self, *args, **options):
        services.append(self)
        original(self, *args, **options)

    monkeypatch.setattr(Service, "__init__", kept)
    split = gallery_service.open_sharded(str(tmp_path / "g"), 4)
    wanted = whole.search(queries, 6)

    def processes():
        return ray.get([actor.process.remote() for actor in services[0].actors])

    def compare():
        found = split.search(queries, 6)
        for name in ("most_ids", "most_scores", "most_vectors", "least_ids", "least_scores", "least_vectors"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))

    compare()
    pids = processes()
    assert len(set(pids)) == 4
    os.kill(pids[1], signal.SIGKILL)  # the next search waits until it has loaded its part again
    compare()
    assert pids[1] not in processes()
    services[0].close()
    with pytest.raises(GalleryMismatchError, match="fingerprint"):
        gallery_service.open_sharded(str(tmp_path / "g"), 2, expect=Expectation(fingerprint="0" * 32))

    with Service(_process, 3) as service:
        assert [a[:2] for a in service.ask(["a", "b", "c"])] == [(0, "a"), (1, "b"), (2, "c")]
        with pytest.raises(EngineError, match="2 requests for 3 parts"):
            service.ask(["a", "b"])
    with pytest.raises(EngineError, match="lost"):
        Service(_process, 8, restarts=0)
