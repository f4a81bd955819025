"""The training loop: learning rate, moving average, log, and a checkpoint from which a run that was cut off goes on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster.files import replacing


def scheduled(lr: float, step: int, warm_up: int, done: float) -> float:
    """Learning rate after a linear warm-up of some steps, on a cosine to a fiftieth over the share of the time done."""
    return lr * min(1.0, (step + 1) / warm_up) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


class Loop:
    """One network's training.

        loop = Loop(folder, "swapper", network, optimiser, rng, rate=..., minutes=5)
        for done in loop:
            loop.step(loss, {"loss": float(loss)})

    OUT/NAME.safetensors holds the weights' moving average, OUT/training.json the counters, and
    OUT/NAME-checkpoint.safetensors all from which a run that was cut off goes on, to the same weights as without
    the cut. A run that had reached its end begins another round from the average, with an optimiser of its own.

    Args:
        out: folder of these files; made.
        name: of the network's file.
        network: trained in place; has the weights of the files where there are some.
        optimiser: of its parameters.
        rng: for all that is drawn.  Given the steps before this round.
        rate: learning rate by the round's step and the share of it that is done.
        minutes, steps: how long a round is; steps, where given, so that the same seed gives the same weights.
        count: name of the counter beside steps and seconds.
        decay: of the average, at most, and the steps in which it gets near that.
        every: steps between two lines of the log and two checkpoints.
        clock: seconds.
        in_all: what earlier runs took counts, there is one round.

    Attributes:
        record: steps, seconds and `count` of all rounds.
        average: the weights' moving average, float32.
        rng: see above.
    """

    def __init__(
        self, out: Path, name: str, network: nn.Module, optimiser: torch.optim.Optimizer,
        rng: Callable[[int], np.random.Generator], *, rate: Callable[[int, float], float], minutes: float | None = None,
        steps: int | None = None, count: str = "faces", decay: tuple[float, int] = (0.998, 20), every: int = 50,
        clock: Callable[[], float] = time.monotonic, in_all: bool = False,
    ) -> None:  # fmt: skip
        self.out, self.name, self.network, self.optimiser = out, name, network, optimiser
        self.rate, self.minutes, self.steps, self.count = rate, minutes, steps, count
        self.decay, self.every, self.clock = decay, every, clock
        self.record = {"steps": 0, count: 0, "seconds": 0.0}
        self.before = dict(self.record)  # this round
        self.sums: dict[str, list[float]] = {}
        out.mkdir(parents=True, exist_ok=True)
        state, about = self._checkpoint()
        self.record |= about.get("record", {})
        goes_on = bool(state) and (in_all or not about["finished"])
        if goes_on:
            network.load_state_dict(_part(state, "network"))
            self.average = _part(state, "average")
            groups = optimiser.state_dict()["param_groups"]
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in _part(state, "optimiser").items():
                index, _, kind = key.partition(".")
                moments.setdefault(int(index), {})[kind] = value
            optimiser.load_state_dict({"state": moments, "param_groups": groups})
            self.before = about["before"]
        else:
            if (out / f"{name}.safetensors").exists():
                network.load_state_dict(load_file(out / f"{name}.safetensors"))
            self.average = {k: v.detach().clone().float() for k, v in network.state_dict().items()}
            if not in_all:
                self.before = dict(self.record)
        self.rng = rng(self.before["steps"])
        if goes_on:
            self.rng.bit_generator.state = about["rng"]

    @property
    def _checkpoint_path(self) -> Path:
        return self.out / f"{self.name}-checkpoint.safetensors"

    def _checkpoint(self) -> tuple[dict[str, Tensor], dict]:
        if self._checkpoint_path.exists():
            with safe_open(self._checkpoint_path, "pt") as file:
                return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["loop"])  # noqa: SIM118
        old = self.out / "training.json"  # beside weights of a version without checkpoints
        return {}, {"record": json.loads(old.read_text())} if old.exists() else {}

    def done(self) -> float:
        """Share of the round that is done."""
        if self.steps is not None:
            return (self.record["steps"] - self.before["steps"]) / self.steps
        return (self.record["seconds"] - self.before["seconds"]) / (60 * self.minutes)

    def __iter__(self) -> Iterator[float]:
        """The share done, step by step, up to the round's end; then the checkpoint says that it is finished."""
        begin, seconds = self.clock(), self.record["seconds"]
        while (done := self.done()) < 1:
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate(self.record["steps"] - self.before["steps"], done)
            yield done
            self.record["seconds"] = seconds + self.clock() - begin
            if (self.record["steps"] - self.before["steps"]) % self.every == 0:
                text = ", ".join(f"{k} {np.mean(v):.3f}" for k, v in self.sums.items())
                print(f"step {self.record['steps']} {self.record['seconds']:.0f} s: {text}", flush=True)
                self.sums.clear()
                self.save()
        self.save(finished=True)

    def step(self, loss: Tensor, measured: dict[str, float], count: int) -> None:
        """One step of the optimiser and of the average.

        Args:
            loss: of this step, with its gradient's graph.
            measured: for the log.
            count: what this step adds to the counter.
        """
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in self.optimiser.param_groups for p in group["params"]], 1.0)
        self.optimiser.step()
        self.record["steps"] += 1
        self.record[self.count] += count
        step = self.record["steps"] - self.before["steps"]
        decay = min(self.decay[0], step / (step + self.decay[1]))
        with torch.no_grad():
            for k, v in self.network.state_dict().items():
                self.average[k].lerp_(v.float(), 1 - decay)
        for k, v in measured.items():
            self.sums.setdefault(k, []).append(v)

    def save(self, finished: bool = False) -> None:
        """Write the files."""
        weights = self.network.state_dict()
        average = {k: v.to(weights[k].dtype).contiguous() for k, v in self.average.items()}
        state = {f"network.{k}": v for k, v in weights.items()} | {f"average.{k}": v for k, v in self.average.items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            state |= {f"optimiser.{index}.{k}": v for k, v in moments.items()}
        about = {
            "record": self.record, "before": self.before, "rng": self.rng.bit_generator.state, "finished": finished
        }  # fmt: skip
        with replacing(self._checkpoint_path) as temporary:
            save_file({k: v.contiguous() for k, v in state.items()}, temporary, {"loop": json.dumps(about)})
        with replacing(self.out / f"{self.name}.safetensors") as temporary:
            save_file(average, temporary)
        with replacing(self.out / "training.json") as temporary:
            Path(temporary).write_text(json.dumps(self.record, indent=1))


def _part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
