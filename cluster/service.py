"""A service: actors on the nodes of the cluster that each hold a part of something, and answer requests together.

For data that no process should hold alone.  The engine's stages are about rows that come and go; a service stays while
somebody asks it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from cluster.errors import EngineError
from cluster.session import import_path
from cluster.stage import Resources

Answer = Callable[[Any], Any]


class _Holder:
    """Runs in an actor: makes a part's answerer when it starts, and again when it is started anew."""

    def __init__(self, factory: Callable[[int], Answer], part: int) -> None:
        self._answer = factory(part)

    def answer(self, request: Any) -> Any:
        return self._answer(request)

    def process(self) -> int:
        """The process's id, once the part is there."""
        return os.getpid()


class Service:
    """Parts of something, one an actor, spread over the nodes; use as a context manager, or ``close`` it.

    An actor that is lost (killed, or its node is) is started anew, on any node, by calling the factory again; requests
    that it had are asked again, so answering must change nothing.  Ray must be connected (``ray_session``).

    Args:
        factory: called in the actor with the part's number, returns the function that answers; picklable.
        parts: how many.
        resources: of one actor; ``num_cpus`` None reserves nothing.
        restarts: of one actor, after which its loss is an error; -1 for no limit.
        address: of the cluster that Ray was connected to, as ``Engine`` has it; None for a local one.

    Raises:
        EngineError: an actor could not be started, or its factory failed.
    """

    def __init__(
        self,
        factory: Callable[[int], Answer],
        parts: int,
        *,
        resources: Resources = Resources(),
        restarts: int = 20,
        address: str | None = None,
    ) -> None:
        import ray  # late: it takes a second, which processes that start no Ray need not pay

        self._ray = ray
        threads = str(resources.threads or 1)
        env = {name: threads for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        if address is None and (path := import_path()):
            env["PYTHONPATH"] = path  # actors then import what this process can, from a checkout or installed
        holder = ray.remote(_Holder).options(
            num_cpus=resources.num_cpus or 0,
            num_gpus=resources.num_gpus,
            memory=resources.memory,
            max_restarts=restarts,
            max_task_retries=-1 if restarts < 0 else restarts,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": env},
        )
        self.actors = [holder.remote(factory, part) for part in range(parts)]
        try:
            self._get([actor.process.remote() for actor in self.actors])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ask(self, requests: Sequence[Any]) -> list[Any]:
        """Send each part its request, all at once; their answers, in the order of parts.

        Raises:
            EngineError: a part is lost for good.
            Exception: what a part's answerer raised.
        """
        if len(requests) != len(self.actors):
            raise EngineError(f"{len(requests)} requests for {len(self.actors)} parts")
        return self._get([actor.answer.remote(r) for actor, r in zip(self.actors, requests, strict=True)])

    def close(self) -> None:
        """End the actors."""
        for actor in self.actors:
            self._ray.kill(actor)
        self.actors = []

    def _get(self, references: list[Any]) -> list[Any]:
        try:
            return self._ray.get(references)
        except self._ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except self._ray.exceptions.RayError as error:
            raise EngineError(f"a part of the service is lost: {error}") from error
