"""What a face costs: floating point operations, parameters, seconds (the paper's Table 5)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipelines import models
from pipelines.config import ENCODER, Config, load_config
from pipelines.stages.tune import settings_of
from scol_ops.attack import AttackSettings, attack
from scol_ops.metrics import to_uint8
from scol_ops.models.recognisers import ffhq_mean_geometry
from scol_ops.paste import face_mask
from scol_ops.refinement import RefineSettings, refine
from scol_ops.tuning import TuneSettings, tune


@dataclass(frozen=True)
class Cost:
    """`gflops`: 10^9 floating point operations of a face, a multiply-add being two, as PyTorch's counter counts convolutions and
    matrix products. `mparams`: 10^6 parameters of all networks involved. `seconds`: on `device`, all steps.
    `parts`: GFLOPs by stage."""

    gflops: float
    mparams: float
    seconds: float
    device: str
    parts: dict[str, float]


def _counted(work) -> tuple[float, float]:
    """GFLOPs and seconds of a call (timed without the counter)."""
    begin = time.monotonic()
    work()
    seconds = time.monotonic() - begin
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9, seconds


def _by_steps(work, steps: int) -> tuple[float, float]:
    """GFLOPs and seconds of `steps` steps, from one and three of them: every step costs the same."""
    if not steps:
        return 0.0, 0.0
    work(1)  # the first call of all pays for what PyTorch sets up
    (one, short), (three, longer) = (_counted(lambda n=n: work(n)) for n in (1, 3))
    return one + (three - one) / 2 * (steps - 1), short + max(0.0, longer - short) / 2 * (steps - 1)


def measure(profile: str, sets: tuple[str, ...] = ()) -> Cost:
    """Cost of inversion, tuning, refinement and attack of one generated face; search and fusion are matrix products of
    16 x N x 512 numbers, and detection depends on the photo: neither is in it."""
    config = load_config(profile, sets=sets)
    device = models.pick_device(config.engine.device)
    generator, encoder = models.generator(config.generator, device), models.encoder(device)
    used = {name for name in (*config.tune.identity, *(config.refine.identity if config.refine.steps else ())) if name != ENCODER}
    networks = [generator, encoder, *(models.recogniser(name, device) for name in sorted(used))]
    with torch.no_grad():
        z = torch.randn(2, 512, generator=torch.Generator().manual_seed(3))
        first, other = (generator.mapping(z.to(device))[i : i + 1, None].expand(1, 16, -1) for i in (0, 1))
        face = generator(first).clamp(-1, 1)
    face = torch.from_numpy(to_uint8(face[0])).permute(2, 0, 1)[None].float().to(device) / 127.5 - 1
    landmarks, box = (t.to(device) for t in ffhq_mean_geometry(1, config.crop_size))
    mask = face_mask(landmarks, config.crop_size)
    parts = _parts(config, generator, encoder, face, other, mask, landmarks, box, device)
    unique = {id(p): p.numel() for network in networks for p in network.parameters()}
    return Cost(
        sum(g for g, _ in parts.values()), sum(unique.values()) / 1e6, sum(s for _, s in parts.values()),
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)",
        {name: g for name, (g, _) in parts.items()})


def _parts(config: Config, generator, encoder, face, other, mask, landmarks, box, device) -> dict[str, tuple[float, float]]:
    def features(names):
        return [models.identity_feature(name, device, landmarks, box) for name in names]

    def invert():
        with torch.no_grad():
            return encoder(models.at_encoder_size(face))

    def tuning(steps: int):
        tune(generator, other, face, mask, features(config.tune.identity), config.tune.margin_of_each(),
             TuneSettings(**(vars(settings_of(TuneSettings, config.tune)) | {"steps": steps, "target_psnr": 200.0})))

    def refining(steps: int):
        refine(face * 0.9, face, mask, features(config.refine.identity), config.refine.margin_of_each(), None,
               RefineSettings(**(vars(settings_of(RefineSettings, config.refine)) | {"steps": steps})))

    def attacking(steps: int):
        settings = AttackSettings(**(vars(settings_of(AttackSettings, config.attack)) | {"steps": steps}))
        target = torch.zeros(1, 16, 512, device=device)
        attack(lambda x: encoder(models.at_encoder_size(x)), face, target, torch.ones_like(target, dtype=torch.bool), mask, settings)

    return {
        "invert": _counted(invert), "tune": _by_steps(tuning, config.tune.steps),
        "refine": _by_steps(refining, config.refine.steps if config.refine.identity else 0),
        "attack": _by_steps(attacking, config.attack.steps if config.attack.enabled else 0),
    }
