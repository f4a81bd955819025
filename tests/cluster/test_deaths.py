"""What is found out about workers that died."""

import os
import socket
from dataclasses import replace

import pytest
import ray

from cluster.deaths import Birth, birth, brief, last_words, node_lost, read_tail

pytestmark = pytest.mark.usefixtures("ray_cluster")
BROKEN = RuntimeError("The actor is unavailable: RPC error: connection reset")


def born() -> Birth:
    return ray.get(ray.remote(num_cpus=0)(birth).remote())


def test_a_worker_says_where_it_lives():
    found = born()
    assert found.pid != os.getpid() and found.node == ray.nodes()[0]["NodeID"] and os.path.isfile(found.log)


def test_a_node_is_lost_if_ray_says_so_or_its_raylet_does_not_answer(monkeypatch):
    here = born()
    assert not node_lost(BROKEN, here) and not node_lost(BROKEN, None)
    assert node_lost(RuntimeError("The actor died because its node has died. Node Id: ab"), None)
    assert node_lost(BROKEN, replace(here, node="0" * 56))
    with socket.socket() as free:  # bound and not listening: connections are refused
        free.bind(("127.0.0.1", 0))
        gone = ray.nodes()[0] | {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": free.getsockname()[1]}
        monkeypatch.setattr(ray, "nodes", lambda: [gone])
        assert node_lost(BROKEN, here)


def test_last_words_are_read_on_the_workers_node(tmp_path):
    path = tmp_path / "worker.err"
    path.write_text(
        "first\n" * 30 + ":job_id:01\nFatal Python error\nCurrent thread 0x7f00ab12 (most recent call first)\n"
    )
    here = replace(born(), log=str(path))
    words = last_words(here, lines=3).splitlines()
    assert words == ["first", "Fatal Python error", "Current thread 0x... (most recent call first)"]
    assert brief("\n".join(words), 30) == "Fatal Python error Current ..."
    assert brief("a b\nValueError: no", 10) == "...ror: no"
    path.unlink()
    assert last_words(here) == last_words(None) == last_words(replace(here, log=None)) == ""


def test_of_a_long_log_only_the_end_is_read(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"x" * 100_000 + b"\n\xffend\n")
    assert read_tail(str(path), 5, most=10) == "xxxx\n\ufffdend"
