"""Ray's worker processes forked from one that has imported what they need, instead of each started from nothing.

A worker of the pipeline spends 5 s of processor time on imports (Ray, PyTorch, SciPy, ours) before it does anything,
and the tests start hundreds. `warm()` has Ray start workers by this file: it hands Ray's command line, environment and
output files to a parent process with the imports done, which forks the worker. From there on the worker is as any
other: a process of its own, with Ray's own main programme. Where a worker wants another interpreter, Ray's own set-up
file is run instead. SCOL_TEST_COLD=1 turns all of it off.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
IMPORTS = ("pipelines.stages.tune", "pipelines.stages.publish", "pipelines.evaluate.measure")


@contextlib.contextmanager
def warm():
    """A local Ray that is started inside the block forks its workers."""
    from ray._private import services

    before = services.start_raylet

    def start_raylet(*args, **kwargs):
        cold = [n for n, a in enumerate(args) if isinstance(a, str) and a.endswith("/setup_worker.py")]
        args = [os.path.abspath(__file__) if n in cold else a for n, a in enumerate(args)]
        assert len(cold) == 1, "Ray starts its workers otherwise than it did"
        os.environ["SCOL_TEST_SETUP_WORKER"] = os.path.join(
            os.path.dirname(services.__file__), "workers/setup_worker.py"
        )
        return before(*args, **kwargs)

    if os.environ.get("SCOL_TEST_COLD"):
        yield
        return
    services.start_raylet = start_raylet
    try:
        yield
    finally:
        services.start_raylet = before


# ---- in the process that Ray starts ----------------------------------------------------------------------------------


def ask(arguments: list[str]) -> None:
    """Have the worker with this command line forked; become it where that is not possible."""
    options = dict(word[2:].split("=", 1) for word in arguments if word.startswith("--") and "=" in word)
    context = json.loads(options.get("serialized-runtime-env-context") or "{}")
    environment = {**os.environ, **context.get("env_vars", {})}
    plain = context.get("command_prefix") or context.get("override_worker_entrypoint")
    if plain or options.get("language", "PYTHON") != "PYTHON":
        os.execv(sys.executable, [sys.executable, os.environ["SCOL_TEST_SETUP_WORKER"], *arguments])
    own = ("--serialized-runtime-env-context=", "--language=")
    command = [word for word in arguments if not word.startswith(own)]
    with connection(options["temp-dir"]) as parent:
        socket.send_fds(parent, [b"f"], [1, 2])
        parent.sendall(json.dumps([command, environment, os.getcwd()]).encode())
        parent.shutdown(socket.SHUT_WR)
        parent.recv(1)  # the parent has forked


def connection(folder: str) -> socket.socket:
    """To the parent process of this Ray, which is started by the first who asks."""
    place = os.path.join(folder, "warm")
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(place):
            environment = os.environ | dict.fromkeys(THREADS, "1")
            with open(f"{place}.log", "w") as log:
                command = [sys.executable, __file__, "--serve", place]
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            while not os.path.exists(place):
                time.sleep(0.02)
    found = socket.socket(socket.AF_UNIX)
    found.connect(place)
    return found


# ---- in the parent of the workers ------------------------------------------------------------------------------------


def serve(place: str) -> None:
    """Fork a worker for each who asks, until Ray ends."""
    import gc
    import importlib

    raylet = int(os.environ["RAY_RAYLET_PID"])
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{place}.new")
    listener.listen(64)
    listener.settimeout(1.0)
    os.rename(f"{place}.new", place)  # whoever asks from now on waits until the imports are done
    import ray  # noqa: F401

    for name in IMPORTS:
        importlib.import_module(name)
    threads = [open(f"/proc/self/task/{n}/comm").read().strip() for n in os.listdir("/proc/self/task")]
    threads = [name for name in threads if name != "jemalloc_bg_thd"]  # of PyArrow; it looks after itself at a fork
    assert len(threads) == 1, f"threads do not survive a fork: {threads}"
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers leave no zombies
    while os.path.exists(f"/proc/{raylet}"):
        try:
            client, _ = listener.accept()
        except TimeoutError:
            continue
        client.settimeout(None)
        _, files, _, _ = socket.recv_fds(client, 1, 2)
        with client, client.makefile("rb") as stream:
            command, environment, folder = json.loads(stream.read())
            if os.fork() == 0:
                listener.close()
                client.close()
                become(command, environment, folder, files)
            client.sendall(b"f")
        for file in files:
            os.close(file)


def become(command: list[str], environment: dict[str, str], folder: str, files: list[int]) -> None:
    """Run a worker's programme in this process, to its end."""
    import random

    import numpy as np
    import torch

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for target, file in zip((1, 2), files, strict=True):
        os.dup2(file, target)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    random.seed()
    np.random.seed()
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count())))  # read at import otherwise
    sys.argv = command
    status = 1
    try:
        runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1] == "--serve" else ask(sys.argv[1:])
