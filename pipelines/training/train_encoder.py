"""Train the compact encoder on generated faces: ``python -m pipelines.training.train_encoder``.

``--make`` draws codes (as ``train_head.draw_codes``: half plain W, half style-mixed) and renders them at
256 px; ``--train MINUTES`` learns code regression from augmented pictures, then adds picture and identity
losses through the generator.  Augmentations close the distance to real photos: recompression, blur,
noise, colour, occluders, other backgrounds, misalignment.  Only generated pictures are read.

``--evaluate`` reports on 512 unseen generated faces, and with ``--photos DIR`` on aligned real ones.
Checkpoints (``encoder.safetensors``, ``training.json``) resume training; ``--export`` writes float16.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.training.train_head import draw_codes, psnr
from scol_ops.diversity import jpeg
from scol_ops.filters import low_pass
from scol_ops.models.encoder import Encoder
from scol_ops.models.mobilestylegan import MobileStyleGAN
from scol_ops.models.recognisers import load_recogniser
from scol_ops.models.weights import load_encoder, load_mobilestylegan
from scol_ops.runtime import set_up

CHUNK = 64
TRAIN_SEED, HELD_OUT_SEED = 11, 12
# Where the five landmarks lie in FFHQ-aligned pictures of 256 px on average (for the identity loss only).
MEAN_LANDMARKS = torch.tensor([[[96.0, 119.0], [160.0, 119.0], [128.0, 152.0], [103.0, 184.0], [153.0, 184.0]]])
MEAN_BOX = torch.tensor([[70.0, 70.0, 186.0, 220.0]])


def generator_256(head: Path | None) -> MobileStyleGAN:
    """The 256 px generator, with a head that is still in training if ``head`` names one."""
    if head is None:
        return load_mobilestylegan(256)
    generator = load_mobilestylegan(256, head=None)
    generator.head.load_state_dict(load_file(head))
    return generator.eval().requires_grad_(False)


def make(folder: Path, chunks: int, seed: int, head: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for chunk in range(chunks):
        path = folder / f"{seed}-{chunk:05d}.npz"
        if path.exists():
            continue
        generator = generator_256(head).to(memory_format=torch.channels_last)
        codes = torch.stack([draw_codes(chunk * CHUNK + i, seed, generator) for i in range(CHUNK)])
        pictures = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for batch in codes.split(8):
                pictures.append(((generator(batch).float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            np.savez(file, pictures=torch.cat(pictures).numpy(), codes=codes.numpy().astype(np.float16))
        os.replace(temporary, path)


class Pool:
    """All chunks made so far, in memory; new ones join as they appear."""

    def __init__(self, folder: Path, seed: int, limit: int) -> None:
        self.folder, self.seed, self.limit = folder, seed, limit
        self.names: set[str] = set()
        self.pictures: list[np.ndarray] = []
        self.codes: list[np.ndarray] = []

    def refresh(self) -> int:
        for path in sorted(self.folder.glob(f"{self.seed}-*.npz")):
            if path.name not in self.names and len(self.names) * CHUNK < self.limit:
                with np.load(path, allow_pickle=False) as arrays:
                    self.pictures.append(arrays["pictures"])
                    self.codes.append(arrays["codes"])
                self.names.add(path.name)
        return len(self.pictures) * CHUNK

    def draw(self, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor]:
        index = rng.integers(0, len(self.pictures) * CHUNK, size=batch)
        pictures = np.stack([self.pictures[i // CHUNK][i % CHUNK] for i in index])
        codes = np.stack([self.codes[i // CHUNK][i % CHUNK] for i in index])
        return torch.from_numpy(pictures).float() / 127.5 - 1, torch.from_numpy(codes).float()


def augment(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Pictures (B, 3, 256, 256) as a camera, an upload and a face detector would deliver them."""
    batch, _, size, _ = x.shape
    y = torch.linspace(-1, 1, size)
    yy, xx = torch.meshgrid(y, y, indexing="ij")

    def per_face(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, size=(batch, 1, 1, 1)).astype(np.float32))

    # Another background for a third of the faces: outside a soft ellipse around the head.
    radius = ((xx / per_face(0.75, 0.95)) ** 2 + ((yy - 0.05) / per_face(0.95, 1.15)) ** 2).sqrt()
    inside = torch.sigmoid((1 - radius) * 12)
    colour = torch.from_numpy(rng.uniform(-1, 1, size=(batch, 3, 1, 1)).astype(np.float32))
    other = torch.where(per_face(0, 1) < 0.5, colour.expand_as(x), x.flip(0).roll(size // 2, dims=-1))
    x = torch.where(per_face(0, 1) < 0.33, inside * x + (1 - inside) * other, x)
    # An occluder for a fifth.
    cx, cy = per_face(-0.8, 0.8), per_face(-0.8, 0.9)
    block = (((xx - cx) / per_face(0.1, 0.4)) ** 2 + ((yy - cy) / per_face(0.1, 0.4)) ** 2) < 1
    x = torch.where(block & (per_face(0, 1) < 0.2), colour.flip(0).expand_as(x), x)
    # Light and colour: mild, since the code has to reproduce what is seen.
    x = (x * per_face(0.85, 1.15) + per_face(-0.1, 0.1)) * torch.from_numpy(
        rng.uniform(0.95, 1.05, size=(batch, 3, 1, 1)).astype(np.float32)
    )
    # Misalignment of a landmark detector.
    angle, zoom = per_face(-0.06, 0.06)[:, 0, 0, 0], per_face(0.95, 1.06)[:, 0, 0, 0]
    shift = torch.from_numpy(rng.normal(0, 0.025, size=(batch, 2)).astype(np.float32))
    theta = torch.stack(
        (
            torch.stack((angle.cos() / zoom, -angle.sin() / zoom, shift[:, 0]), 1),
            torch.stack((angle.sin() / zoom, angle.cos() / zoom, shift[:, 1]), 1),
        ),
        1,
    )
    x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), padding_mode="reflection", align_corners=False)
    # Sharpness, noise and recompression: one draw for each half of the batch.
    parts = []
    for part in x.split(max(1, batch // 2)):
        draw = rng.uniform()
        if draw < 0.3:
            part = low_pass(part, float(rng.uniform(0.5, 2.5)))
        elif draw < 0.6:
            small = int(rng.integers(64, 200))
            part = F.interpolate(part, (small, small), mode="bilinear", antialias=True, align_corners=False)
            part = F.interpolate(part, (size, size), mode="bicubic", align_corners=False)
        if rng.uniform() < 0.5:
            part = part + torch.from_numpy(rng.normal(0, rng.uniform(0, 0.06), size=part.shape).astype(np.float32))
        if rng.uniform() < 0.5:
            part = jpeg(part, int(rng.integers(40, 96)))
        parts.append(part)
    return torch.cat(parts).clamp(-1, 1)


def code_statistics(generator: MobileStyleGAN) -> tuple[Tensor, Tensor]:
    z = torch.randn(20000, 512, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        w = generator.mapping(z)
    return generator.mean_code.clone(), w.std(0) * 0.75  # 0.75: the mean truncation of the samples


def explained(pred: Tensor, target: Tensor, mean: Tensor) -> float:
    """Share of the codes' variance about the mean W that the prediction explains, over all layers."""
    return float(1 - (pred - target).square().sum() / (target - mean).square().sum())


class Trainer:
    """State of one training run: networks, optimiser, moving average, counters."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.generator = generator_256(arguments.head).to(memory_format=torch.channels_last)
        torch.manual_seed(0)
        self.encoder = Encoder()
        self.encoder.mean_code, self.encoder.std_code = code_statistics(self.generator)
        for layer in (self.encoder.base, *self.encoder.offsets):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.record = {"steps": 0, "faces": 0, "seconds": 0.0}
        arguments.out.mkdir(parents=True, exist_ok=True)
        checkpoint = arguments.out / "encoder.safetensors"
        if checkpoint.exists():
            self.encoder.load_state_dict(load_file(checkpoint))
            self.record = json.loads((arguments.out / "training.json").read_text())
        elif arguments.from_embedded:
            self.encoder.load_state_dict(load_encoder().state_dict())
        self.encoder.to(memory_format=torch.channels_last)
        self.average = {k: v.detach().clone().float() for k, v in self.encoder.state_dict().items()}
        self.recogniser = load_recogniser("mobilefacenet")

    def save(self) -> None:
        out = self.arguments.out
        state = {k: v.to(self.encoder.state_dict()[k].dtype).contiguous() for k, v in self.average.items()}
        save_file(state, out / "encoder.tmp")
        os.replace(out / "encoder.tmp", out / "encoder.safetensors")
        (out / "training.json").write_text(json.dumps(self.record, indent=1))

    def picture_losses(self, codes: Tensor, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = self.generator(codes).float()
        small, small_clean = F.avg_pool2d(out, 4), F.avg_pool2d(clean, 4)
        pixel = F.mse_loss(out, clean) + F.mse_loss(small, small_clean) + 0.2 * F.l1_loss(out, clean)
        n = clean.shape[0]
        landmarks, box = MEAN_LANDMARKS.expand(n, -1, -1), MEAN_BOX.expand(n, -1)
        with torch.no_grad():
            want = self.recogniser.embed_crops(clean, landmarks, box)
        identity = 1 - (self.recogniser.embed_crops(out, landmarks, box) * want).sum(1).mean()
        return pixel, identity, psnr(out.detach(), clean).mean()

    def train(self) -> None:
        a = self.arguments
        rng = np.random.default_rng([a.seed, self.record["steps"]])
        pool = Pool(a.folder, TRAIN_SEED, a.pool)
        optimiser = torch.optim.AdamW(self.encoder.parameters(), lr=a.lr, betas=(0.9, 0.99), weight_decay=0.01)
        begin, last, step = time.monotonic(), time.monotonic(), 0
        sums: dict[str, list[float]] = {}
        while (elapsed := time.monotonic() - begin) < 60 * a.train:
            while pool.refresh() < 2 * CHUNK:
                time.sleep(5)
            done = elapsed / (60 * a.train)
            for group in optimiser.param_groups:
                group["lr"] = a.lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            self.encoder.train()
            clean, codes = pool.draw(rng, a.batch)
            seen = augment(clean, rng).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                normal = self.encoder.normalised(seen)
            pred = self.encoder.mean_code + self.encoder.std_code * normal.float()
            scale = self.encoder.std_code.square().mean()
            loss = (pred - codes).square().mean() / scale
            measured = {"code": float(loss.detach()), "explained": explained(pred.detach(), codes, self.encoder.mean_code)}
            if a.picture_every and step % a.picture_every == 0 and done >= a.picture_from:
                n = a.picture_batch
                pixel, identity, db = self.picture_losses(pred[:n], clean[:n])
                loss = loss + a.pixel_weight * pixel + a.identity_weight * identity
                measured |= {"pixel": float(pixel.detach()), "identity": float(identity.detach()), "psnr": float(db)}
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
            optimiser.step()
            step += 1
            self.record["steps"] += 1
            self.record["faces"] += a.batch
            decay = min(0.998, step / (step + 20))
            for k, v in self.encoder.state_dict().items():
                self.average[k].lerp_(v.float(), 1 - decay)
            for k, v in measured.items():
                sums.setdefault(k, []).append(v)
            if step % 100 == 0:
                self.record["seconds"] += time.monotonic() - last
                last = time.monotonic()
                text = ", ".join(f"{k} {np.mean(v):.3f}" for k, v in sums.items())
                print(f"step {self.record['steps']} {elapsed:.0f} s, {len(pool.names) * CHUNK} faces: {text}", flush=True)
                sums.clear()
                self.save()
        self.save()


def measure(encoder: Encoder, generator: MobileStyleGAN, clean: Tensor, codes: Tensor | None, landmarks: Tensor, boxes: Tensor) -> dict[str, np.ndarray]:
    """PSNR (dB, 256 px) and recognisers' cosine of G(E(x)) against x, one number a face; code error where codes are known."""
    recognisers = {name: load_recogniser(name) for name in ("mobilefacenet", "dlib_resnet", "faceres")}
    values: dict[str, list[np.ndarray]] = {}
    for i in range(0, len(clean), 8):
        part = slice(i, i + 8)
        with torch.no_grad():
            pred = encoder(clean[part])
            out = generator(pred).clamp(-1, 1)
            values.setdefault("psnr", []).append(psnr(out, clean[part]).numpy())
            for name, r in recognisers.items():
                a = r.embed_crops(out, landmarks[part], boxes[part])
                b = r.embed_crops(clean[part], landmarks[part], boxes[part])
                values.setdefault(f"cosine_{name}", []).append((a * b).sum(1).numpy())
            if codes is not None:
                error = (pred - codes[part]).square().sum((1, 2)) / (codes[part] - encoder.mean_code).square().sum((1, 2))
                values.setdefault("unexplained", []).append(error.numpy())
    return {k: np.concatenate(v) for k, v in values.items()}


def load_trained(folder: Path) -> Encoder:
    encoder = Encoder()
    encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
    return encoder.eval().requires_grad_(False)


def evaluate(arguments: argparse.Namespace) -> None:
    generator = generator_256(arguments.head)
    encoder = load_trained(arguments.out)
    report: dict[str, dict[str, float]] = {}
    codes = torch.stack([draw_codes(i, HELD_OUT_SEED, generator) for i in range(arguments.count)])
    with torch.no_grad():
        clean = torch.cat([generator(c).clamp(-1, 1) for c in codes.split(8)])
    n = len(clean)
    values = measure(encoder, generator, clean, codes, MEAN_LANDMARKS.expand(n, -1, -1), MEAN_BOX.expand(n, -1))
    report["generated"] = {"faces": n, **{k: float(v.mean()) for k, v in values.items()}}
    if arguments.photos:
        from pipelines.training.real_faces import aligned_faces  # needs the detector

        clean, landmarks, boxes = aligned_faces(arguments.photos, min(256, arguments.count), seed=0)
        values = measure(encoder, generator, clean, None, landmarks, boxes)
        report["photos"] = {"faces": len(clean), **{k: float(v.mean()) for k, v in values.items()}}
    (arguments.out / "evaluation.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


def export(arguments: argparse.Namespace) -> None:
    state = load_file(arguments.out / "encoder.safetensors")
    state = {k: v.half() if v.is_floating_point() else v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save_file(state, arguments.export)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/encoder-data"))
    parser.add_argument("--out", type=Path, default=Path("build/encoder"))
    parser.add_argument("--head", type=Path, default=None, help="a head still in training (default: the embedded one)")
    parser.add_argument("--make", type=int, metavar="CHUNKS", help=f"render CHUNKS x {CHUNK} faces")
    parser.add_argument("--train", type=float, metavar="MINUTES")
    parser.add_argument("--from-embedded", action="store_true", help="begin with the embedded encoder's weights")
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--export", type=Path, metavar="FILE")
    parser.add_argument("--photos", type=Path, help="folder of real photos for --evaluate")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pool", type=int, default=20000, help="faces held in memory")
    parser.add_argument("--picture-every", type=int, default=4, help="picture losses every n-th step, 0 for never")
    parser.add_argument("--picture-from", type=float, default=0.3, help="share of the time before picture losses begin")
    parser.add_argument("--picture-batch", type=int, default=4)
    parser.add_argument("--pixel-weight", type=float, default=2.0)
    parser.add_argument("--identity-weight", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    set_up(arguments.threads)
    if arguments.make:
        make(arguments.folder, arguments.make, TRAIN_SEED, arguments.head)
    if arguments.train:
        Trainer(arguments).train()
    if arguments.evaluate:
        evaluate(arguments)
    if arguments.export:
        export(arguments)


if __name__ == "__main__":
    main()
