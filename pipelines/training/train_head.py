"""Distil the 256 px head of MobileStyleGAN: ``python -m pipelines.training.train_head``.

The export has no low-resolution heads.  The teacher is the 1024 px output averaged down by 4; the
student sees the features of block 4 and codes 11..15.  Codes are drawn like those the pipeline
meets: half are one truncated W code for all layers, half are style-mixed (two or three parents by
random crossover, or one parent a layer pulled towards the mean, as fused codes are).

First make teacher pictures (``--make N``), then train on random squares of them (``--train MINUTES``).
Everything is seeded; a run that was cut off goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cluster.files import replacing
from pipelines.training.loop import Loop
from scol_ops.models.embedded import load_mobilestylegan
from scol_ops.models.mobilestylegan import CODE_DIM, HEAD_BLOCKS, NUM_CODES, MobileStyleGAN
from scol_ops.runtime import set_up

HELD_OUT = 200  # samples 0..199 of the evaluation seed, never trained on


def draw_codes(index: int, seed: int, generator: MobileStyleGAN) -> torch.Tensor:
    """The code of sample ``index``: (16, 512); even indices are plain, odd ones style-mixed."""
    rng = np.random.default_rng([seed, index])
    z = torch.from_numpy(rng.standard_normal((NUM_CODES, CODE_DIM)).astype(np.float32))
    with torch.no_grad():
        w = generator.mapping(z)
    mean = generator.mean_code
    psi = float(rng.uniform(0.5, 1.0))
    if index % 2 == 0:
        codes = w[:1].expand(NUM_CODES, -1)
    elif index % 4 == 1:
        cuts = np.sort(rng.integers(1, NUM_CODES, size=2))
        codes = torch.cat(
            [w[0].expand(cuts[0], -1), w[1].expand(cuts[1] - cuts[0], -1), w[2].expand(NUM_CODES - cuts[1], -1)]
        )
    else:
        strength = torch.from_numpy(rng.uniform(0.3, 1.0, size=(NUM_CODES, 1)).astype(np.float32))
        codes = w[0] + strength * (w - w[0]) * 0.7
    return (mean + psi * (codes - mean)).contiguous()


def make(folder: Path, count: int, seed: int, start: int = 0) -> None:
    teacher = load_mobilestylegan(1024)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(start, start + count):
        path = folder / f"{seed}-{index:06d}.npz"
        if path.exists():
            continue
        codes = draw_codes(index, seed, teacher)
        with torch.no_grad():
            picture = F.avg_pool2d(teacher(codes[None]), 4)[0]
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, codes=codes.numpy(), picture=picture.numpy().astype(np.float16))


def cache_features(folder: Path, seed: int, generator: MobileStyleGAN) -> list[Path]:
    """Write block 4's output of every sample beside it (float16, (256, 128, 128)); return the samples that have one."""
    ready = []
    for path in sorted(folder.glob(f"{seed}-*.npz")):
        target = path.with_suffix(".npy")
        if not target.exists():
            codes, _ = load([path])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                features = generator.features(codes)[0].contiguous().to(torch.float16)
            with replacing(target) as temporary, open(temporary, "wb") as file:
                np.save(file, features.numpy())
        ready.append(path)
    return ready


def crops(
    paths: list[Path], rng: np.random.Generator, size: int = 64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random square of each sample: features (B, 256, size, size), codes, picture (B, 3, 2 size, 2 size)."""
    features, codes, pictures = [], [], []
    for path in paths:
        top, left = rng.integers(0, 128 - size + 1, size=2)
        whole = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        features.append(np.array(whole[:, top : top + size, left : left + size], dtype=np.float32))
        sample = np.load(path, allow_pickle=False)
        codes.append(sample["codes"])
        area = sample["picture"][:, 2 * top : 2 * (top + size), 2 * left : 2 * (left + size)]
        pictures.append(area.astype(np.float32))
    return tuple(torch.from_numpy(np.stack(a)) for a in (features, codes, pictures))


def load(paths: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    arrays = [np.load(path, allow_pickle=False) for path in paths]
    return (
        torch.from_numpy(np.stack([a["codes"] for a in arrays])),
        torch.from_numpy(np.stack([a["picture"] for a in arrays]).astype(np.float32)),
    )


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of each picture of a batch in [-1, 1] (peak-to-peak 2, both clamped)."""
    mse = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / mse)


def evaluate(generator: MobileStyleGAN, folder: Path, seed: int) -> dict[str, float]:
    values = []
    for index in range(HELD_OUT):
        path = folder / f"{seed}-{index:06d}.npz"
        if path.exists():
            codes, picture = load([path])
            with torch.no_grad():
                values.append((index, float(psnr(generator(codes), picture))))
    plain = [v for i, v in values if i % 2 == 0]
    mixed = [v for i, v in values if i % 2 == 1]
    every = [v for _, v in values]
    return {
        "samples": len(values),
        "psnr_mean": float(np.mean(every)),
        "psnr_plain": float(np.mean(plain)),
        "psnr_mixed": float(np.mean(mixed)),
        "psnr_min": float(np.min(every)),
    }


def begin(head: nn.Module) -> None:
    """Weights to begin with: near a picture without detail, all styles at one."""
    for layer in head.layers:
        nn.init.normal_(layer.style.weight, std=0.02)
        nn.init.constant_(layer.style.bias, 1.0)
        nn.init.kaiming_normal_(layer.conv.weight, a=0.2)
        nn.init.zeros_(layer.conv.bias)
        nn.init.normal_(layer.depthwise.weight, std=0.1)
        with torch.no_grad():
            layer.depthwise.weight[:, :, 1, 1] += 1.0
    for image in (head.skip, head.to_img):
        nn.init.normal_(image.style.weight, std=0.02)
        nn.init.constant_(image.style.bias, 1.0)
        nn.init.normal_(image.conv.weight, std=0.01)
        nn.init.zeros_(image.conv.bias)


def train(a: argparse.Namespace) -> None:
    """Train the head on the samples in ``--folder``, then measure it on those held out."""
    torch.manual_seed(a.seed)
    generator = load_mobilestylegan(256, head=None)
    head = generator.head.requires_grad_(True)
    begin(head)
    generator.to(memory_format=torch.channels_last)
    paths = cache_features(a.folder, a.seed, generator)
    print(f"{len(paths)} samples", flush=True)

    def rate(step: int, done: float) -> float:
        return a.lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done)) + 1e-6

    optimiser = torch.optim.Adam(head.parameters(), lr=a.lr, betas=(0.9, 0.99))
    loop = Loop(
        a.out, "head", head, optimiser, lambda steps: np.random.default_rng(a.seed), rate=rate, minutes=a.train,
        steps=a.steps, count="squares", decay=(0.995, 20),
    )  # fmt: skip
    for _ in loop:
        chosen = [paths[i] for i in loop.rng.choice(len(paths), a.batch, replace=False)]
        features, codes, picture = crops(chosen, loop.rng)
        features = features.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            student = head(features, codes[:, 2 * HEAD_BLOCKS + 1 :]).float()
        loss = F.mse_loss(student, picture) + 0.1 * F.l1_loss(student, picture)
        loop.step(loss, {"PSNR (squares), dB": float(psnr(student.detach(), picture).mean())}, a.batch)
    head.load_state_dict(loop.average)
    steps = loop.record["steps"] - loop.before["steps"]
    measured = {"steps": steps, "batch": a.batch, "seed": a.seed}
    measured |= evaluate(generator.float(), a.folder, a.held_out_seed)
    (a.out / "head.json").write_text(json.dumps(measured, indent=1))
    print(measured)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/head-data"))
    parser.add_argument("--out", type=Path, default=Path("build/head"))
    parser.add_argument("--make", type=int, metavar="N", help="make N teacher pictures of --seed")
    parser.add_argument("--start", type=int, default=0, help="first index to make")
    parser.add_argument("--train", type=float, metavar="MINUTES")
    parser.add_argument(
        "--steps", type=int, help="train for so many steps instead, which does not depend on the machine"
    )
    parser.add_argument("--seed", type=int, default=1, help="training samples (evaluation uses --held-out-seed)")
    parser.add_argument("--held-out-seed", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    set_up(arguments.threads)
    if arguments.make:
        make(arguments.folder, arguments.make, arguments.seed, arguments.start)
    if arguments.train or arguments.steps:
        train(arguments)


if __name__ == "__main__":
    main()
