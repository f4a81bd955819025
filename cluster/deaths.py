"""Why a worker died: whether its node went with it, and what it said last."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
from dataclasses import dataclass

log = logging.getLogger("cluster")

_PROBE_SECONDS = 2.0
_READ_SECONDS = 10.0


@dataclass(frozen=True)
class Birth:
    """Where a worker lives.

    Attributes:
        pid: its process id.
        node: Ray's id of its node, hex; None without Ray.
        log: the file that its standard error goes to; None where that is no file or the system does not say.
    """

    pid: int
    node: str | None
    log: str | None


def birth() -> Birth:
    """Of this process."""
    import ray  # late: it takes a second, which processes that start no Ray need not pay

    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else None
    path = os.path.realpath("/proc/self/fd/2")
    return Birth(os.getpid(), node, path if os.path.isfile(path) else None)


def obey_sigterm() -> None:
    """Let SIGTERM end this process at once, where it is a worker of Ray's.

    A worker is told so when its node is shut down or preempted, or its raylet dies. Ray makes an exception of it,
    inside whatever the worker is doing, which would then look like a fault of the item in hand. Nothing needs to be
    tidied up: a part is there with its commit, or not at all.
    """
    import ray  # late: it takes a second, which processes that start no Ray need not pay

    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))


def node_lost(error: Exception, born: Birth | None) -> bool:
    """Whether a worker died because its node did: preempted, shut down, or its raylet killed.

    Ray may take half a minute to say so, and reports the worker's broken connection before. So the raylet is asked
    as well: its port refuses at once where the process is gone, and does not answer where the machine is.

    Args:
        error: what Ray raised for the call in hand.
        born: of the worker; None if it never said.
    """
    import ray  # late: it takes a second, which processes that start no Ray need not pay

    words = str(error).lower()
    if "node has died" in words or "node died" in words or getattr(error, "preempted", False):
        return True
    if born is None or born.node is None:
        return False
    nodes = [node for node in ray.nodes() if node["NodeID"] == born.node]
    if not any(node["Alive"] for node in nodes):
        return True
    try:
        place = (nodes[0]["NodeManagerAddress"], nodes[0]["NodeManagerPort"])
        with socket.create_connection(place, timeout=_PROBE_SECONDS):
            return False
    except OSError:
        return True


def last_words(born: Birth | None, lines: int = 20) -> str:
    """The end of a dead worker's standard error, read on its own node; empty where it cannot be had.

    Addresses are blanked, so that the same crash reads the same every time.
    """
    import ray  # late: it takes a second, which processes that start no Ray need not pay
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if born is None or born.node is None or born.log is None:
        return ""
    # Without cores of its own: it must come through however busy the node is.
    place = NodeAffinitySchedulingStrategy(born.node, soft=False)
    reader = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(read_tail)
    try:
        words = ray.get(reader.remote(born.log, lines), timeout=_READ_SECONDS)
    except (ray.exceptions.RayError, OSError) as error:
        log.debug("the log of a dead worker cannot be read: %s", error)
        return ""
    return re.sub(r"0x[0-9a-fA-F]+", "0x...", words)


def brief(words: str, longest: int = 300) -> str:
    """Last words on one line: from where Python's fault handler begins, if it does, else the end of them."""
    start = words.rfind("Fatal Python error")
    words = " ".join(words[max(0, start) :].split())
    if len(words) <= longest:
        return words
    return words[: longest - 3] + "..." if start >= 0 else "..." + words[3 - longest :]


def read_tail(path: str, lines: int, most: int = 16384) -> str:
    """The last lines of a text file, of its last `most` bytes.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        text = file.read().decode(errors="replace")
    noise = (":", "Extension modules:")  # Ray's own marks; a long list of the fault handler's
    return "\n".join([line for line in text.splitlines() if not line.startswith(noise)][-lines:])
