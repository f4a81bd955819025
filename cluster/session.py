"""Connection to Ray: a small local cluster by default, an existing one by address."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import EngineError

log = logging.getLogger("cluster")

# Ray puts Unix sockets some 70 characters below its folder; a socket's path may have 107.
_LONGEST_TEMP_DIR = 36


@contextmanager
def ray_session(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    object_store_bytes: int = 256 * 2**20,
    temp_dir: str | None = None,
) -> Iterator[None]:
    """Have Ray connected inside the block. A connection that exists already is used and left as it is.

    Args:
        address: of a running cluster ("auto", "HOST:6379"); None starts a local one for this process and stops it at
            the end. The local one has no dashboard and sends no usage statistics. Ray listens on all interfaces, so
            it is made to ask for a random token, which child processes inherit through their environment; not so
            where RAY_AUTH_MODE is set, or where Ray was imported before and has read its settings.
        num_cpus: cores the local cluster may use; None for all that this process may use.
        object_store_bytes: of the local cluster. The engine passes keys and part names, no data, so it can be small.
        temp_dir: folder for the local cluster's sockets and logs, kept; None for a new one below /tmp, removed at
            the end. At most 36 characters, because of the limit on the length of a socket's path.

    Raises:
        EngineError: no cluster answers at `address`, the local one does not start, or `temp_dir` is too long.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray  # takes a second, which commands that run nothing should not pay

    if ray.is_initialized():
        yield
        return
    own_dir = None
    try:
        if address is None:
            if temp_dir is None:
                parent = "/tmp" if os.access("/tmp", os.W_OK) else None
                temp_dir = own_dir = tempfile.mkdtemp(prefix="ray-", dir=parent)
            if len(os.path.abspath(temp_dir)) > _LONGEST_TEMP_DIR:
                raise EngineError(f"Ray's folder must have at most {_LONGEST_TEMP_DIR} characters: {temp_dir}")
            settings = dict(
                address="local",
                num_cpus=num_cpus if num_cpus is not None else usable_cpus(),
                object_store_memory=object_store_bytes,
                include_dashboard=False,
                _temp_dir=os.path.abspath(temp_dir),
            )
        else:
            settings = dict(address=address)
        try:
            with _own_sigterm():
                ray.init(**settings, logging_level=logging.ERROR, log_to_driver=False, configure_logging=True)
        except Exception as error:  # ConnectionError, RuntimeError, TimeoutError, ValueError: by where it fails
            ray.shutdown()
            where = "a local Ray" if address is None else f"Ray at {address}"
            raise EngineError(f"{where} cannot be reached: {error}") from error
        try:
            with _notices_to_log(ray):
                yield
        finally:
            ray.shutdown()
    finally:
        if own_dir is not None:
            shutil.rmtree(own_dir, ignore_errors=True)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """`ray.init` lets SIGTERM end the process at once; the program's own handler, if it has one, stays instead."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _notices_to_log(ray) -> Iterator[None]:
    """Ray prints notices (a worker died, ...) on standard output, which belongs to the program: log them instead."""
    module = ray._private.worker
    before = getattr(module, "print_to_stdstream", None)  # private; checked by a test

    def to_log(data, ignore_prefix=False):
        log.debug("ray: %s", " ".join(data.get("lines", ())))

    if before is not None:
        module.print_to_stdstream = to_log
    try:
        yield
    finally:
        if before is not None:
            module.print_to_stdstream = before


def usable_cpus(cgroup: str = "/sys/fs/cgroup") -> int:
    """Cores that this process may use: its affinity mask, and its control group's quota where one is set.

    Args:
        cgroup: where the control groups are mounted (version 2: `cpu.max`; version 1: `cpu/cpu.cfs_quota_us`).
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    words = _words(f"{cgroup}/cpu.max") or [
        *_words(f"{cgroup}/cpu/cpu.cfs_quota_us"),
        *_words(f"{cgroup}/cpu/cpu.cfs_period_us"),
    ]
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit():  # "max" and -1 mean no quota
        count = min(count, max(1, int(words[0]) // int(words[1])))
    return count


def _words(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().split()
    except OSError:
        return []


def import_path() -> str:
    """PYTHONPATH with which a worker on this machine imports what this process can import."""
    installed = tuple(os.path.realpath(p) for p in (sys.prefix, sys.base_prefix))
    paths = []
    for entry in sys.path:
        path = os.path.abspath(entry or ".")
        inside = any(os.path.realpath(path).startswith(os.path.join(p, "")) for p in installed)
        # a checkout may lie above its own environment, never the other way round
        if not inside and path not in paths and os.path.exists(path):
            paths.append(path)
    return os.pathsep.join(paths)
