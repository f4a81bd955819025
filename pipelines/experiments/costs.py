"""What a face costs: floating point operations, parameters, seconds (the paper's Table 5)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from cluster import Operator
from pipelines.archive.listing import list_source, source_table
from pipelines.config.load import load_config
from pipelines.config.names import NO_LOOP
from pipelines.config.sections import Config
from pipelines.jobs.demo import draw_person
from pipelines.networks import load as networks
from pipelines.networks import resolve as resolving
from pipelines.run.schemas import OK
from pipelines.stages.declaration import load


def _convolution_backward(
    gradient, x, weight, _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted, **_
) -> int:
    """Each of the two gradients costs what the forward pass did.

    In place of PyTorch's own rule, which takes the weight's gradient of a grouped convolution for a dense one's: many
    times too much for the depthwise ones that the generator is made of.
    """
    return conv_flop_count(x, weight, gradient, transposed=transposed) * (bool(wanted[0]) + bool(wanted[1]))


_RULES = {torch.ops.aten.convolution_backward: _convolution_backward}
_GEOMETRY = ("crop", "landmarks", "box", "quad")


@dataclass(frozen=True)
class Cost:
    """`gflops`: 10^9 floating point operations of a face, a multiply-add being two, as PyTorch counts convolutions
    and matrix products, backward passes included. `mparams`: 10^6 parameters of the networks that took part.
    `seconds`: on `device`. `parts`: GFLOPs by stage."""

    gflops: float
    mparams: float
    seconds: float
    device: str
    parts: dict[str, float]


class _Meter:
    """Counts calls' operations and seconds, and remembers the parameters of every module that ran."""

    def __init__(self) -> None:
        self.parameters: dict[int, int] = {}

    def __call__(self, work: Callable[[], pa.Table]) -> np.ndarray:
        """(GFLOPs, seconds); seconds of a call without the counter. Raises RuntimeError where a face fails."""
        begin = time.monotonic()
        table = work()
        seconds = time.monotonic() - begin
        bad = [r for r, s in zip(table["reason"].to_pylist(), table["status"].to_pylist(), strict=True) if s != OK]
        if bad:
            raise RuntimeError(f"the face failed: {bad[0]}")
        hook = register_module_forward_hook(self._remember)
        try:
            with FlopCounterMode(display=False, custom_mapping=_RULES) as counter:
                work()
        finally:
            hook.remove()
        return np.array([counter.get_total_flops() / 1e9, seconds])

    def _remember(self, module: torch.nn.Module, inputs, output) -> None:
        for parameter in module.parameters(recurse=False):
            self.parameters[id(parameter)] = parameter.numel()


def _aligned(config: Config) -> pa.Table:
    """The row of a generated face's photo after the first stage."""
    with tempfile.TemporaryDirectory() as folder:
        face = Image.fromarray(draw_person(15, 0, 256)).resize((512, 512), Image.Resampling.BICUBIC)
        face.save(Path(folder) / "face.png")
        return load("align", config, "")(source_table(list_source(folder).photos))


def measure(profile: str, sets: tuple[str, ...] = ()) -> Cost:
    """Cost of one generated face, from inversion to attack, by the stages' own operators.

    Steps are alike, so a few are counted and the profile's number of them is what is told.  Not in it: detection
    and publishing, whose cost is the photo's, search and fusion, which are matrix products of L x N x 512 numbers, and
    the closed loop: a look is the judge's, and a round, which some faces need, costs about what the refinement does.

    Raises:
        WeightsError: the profile needs a model that is not in the model store.
    """

    def configured(**values: float) -> Config:
        steps = (f"{k.replace('__', '.')}={v}" for k, v in values.items())
        return resolving.resolve(load_config(profile, sets=(*sets, *NO_LOOP, *steps)))

    config, meter = configured(), _Meter()
    aligned = _aligned(config)
    common = aligned.select(["key", "photo_id", "face_id", "status", "reason", "failed_stage", "seed"])

    def columns(**more) -> pa.Table:
        table = common
        for name, column in {**{f"align__{name}": aligned[name] for name in _GEOMETRY}, **more}.items():
            table = table.append_column(name.replace("__", "."), column)
        return table

    parts: dict[str, np.ndarray] = {}
    invert = load("invert", config, "")
    invert(aligned)  # the first call of all pays for what PyTorch sets up
    inverted = invert(aligned)
    parts["invert"] = meter(lambda: invert(aligned))
    ready = columns(fused=inverted["code"])

    def tuning(tune_steps: int, refine_steps: int) -> np.ndarray:
        few = configured(tune__steps=tune_steps, refine__steps=refine_steps, tune__target_psnr=100)
        work: Operator = load("tune", few, "")
        return meter(lambda: work(ready))

    first = tuning(1, 0)
    parts["tune"] = first + (tuning(3, 0) - first) / 2 * (config.tune.steps - 1)
    parts["refine"] = (tuning(0, 3) - tuning(0, 1)) / 2 * config.refine.steps if config.refines else np.zeros(2)
    parts["attack"] = np.zeros(2)
    if config.attack.enabled:
        std, code, crop = np.ones((config.num_codes, 512), np.float32), inverted["code"], aligned["crop"]
        done = columns(tuned=crop, refined=crop, invert__code=code, fuse__target=code)

        def attacking(steps: int) -> np.ndarray:
            work = load("attack", configured(attack__steps=steps), "", std)
            return meter(lambda: work(done))

        first = attacking(1)
        parts["attack"] = first + (attacking(3) - first) / 2 * (config.attack.steps - 1)
    total = np.sum(list(parts.values()), 0)
    device = networks.pick_device(config.engine.device)
    return Cost(
        float(total[0]),
        sum(meter.parameters.values()) / 1e6,
        float(max(0.0, total[1])),
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)",
        {name: float(value[0]) for name, value in parts.items()},
    )
