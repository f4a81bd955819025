"""Train the compact encoder on generated faces: ``python -m pipelines.training.train_encoder``.

``--make`` draws codes (as ``train_head.draw_codes``: half plain W, half style-mixed) and renders them at
256 px; ``--preview MINUTES`` fits a head to block 3, whose 128 px pictures cost a quarter of the generator's;
``--train MINUTES`` learns code regression from augmented pictures, then adds picture and identity losses
through the preview, and in the end through the generator itself.  Augmentations close the distance to real
photos: recompression, blur, noise, colour, occluders, other backgrounds, misalignment.  The picture to
reproduce has the light, the background and the place that the encoder sees, without the damage.  Only
generated pictures are read.

``--evaluate`` reports on 512 unseen generated faces, and with ``--photos DIR`` on aligned real ones.
A run that was cut off goes on from its checkpoint; ``--export`` writes the packed file that is embedded.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster.files import replacing
from pipelines.config.sections import InvertConfig
from pipelines.training.loop import Loop, scheduled
from pipelines.training.train_head import draw_codes, psnr
from scol_ops.diversity import jpeg
from scol_ops.filters import low_pass
from scol_ops.inversion import InvertSettings, invert
from scol_ops.models.embedded import TRUNK_PREFIX, load_encoder, load_mobilestylegan, load_recogniser
from scol_ops.models.encoder import Encoder
from scol_ops.models.files import pack
from scol_ops.models.mobilestylegan import MobileStyleGAN, StyledLayer, ToImage, inverse_haar
from scol_ops.models.recognisers import ffhq_mean_geometry
from scol_ops.runtime import set_up

CHUNK = 64
TRAIN_SEED, HELD_OUT_SEED = 11, 12


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
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, pictures=torch.cat(pictures).numpy(), codes=codes.numpy().astype(np.float16))


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


def augment(x: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, 256, 256) as a camera, an upload and a face detector would deliver them, and without the
    damage."""
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
    # Light and colour.
    x = (x * per_face(0.75, 1.15) + per_face(-0.2, 0.15)) * torch.from_numpy(
        rng.uniform(0.93, 1.07, size=(batch, 3, 1, 1)).astype(np.float32)
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
    x = F.grid_sample(
        x, F.affine_grid(theta, list(x.shape), align_corners=False), padding_mode="reflection", align_corners=False
    )
    target = x.clamp(-1, 1)
    # An occluder for a fifth.
    cx, cy = per_face(-0.8, 0.8), per_face(-0.8, 0.9)
    block = (((xx - cx) / per_face(0.1, 0.4)) ** 2 + ((yy - cy) / per_face(0.1, 0.4)) ** 2) < 1
    x = torch.where(block & (per_face(0, 1) < 0.2), colour.flip(0).expand_as(x), x)
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
    return torch.cat(parts).clamp(-1, 1), target


def code_statistics(generator: MobileStyleGAN) -> tuple[Tensor, Tensor]:
    z = torch.randn(20000, 512, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        w = generator.mapping(z)
    return generator.mean_code.clone(), w.std(0) * 0.75  # 0.75: the mean truncation of the samples


def explained(pred: Tensor, target: Tensor, mean: Tensor) -> float:
    """Share of the codes' variance about the mean W that the prediction explains, over all layers."""
    return float(1 - (pred - target).square().sum() / (target - mean).square().sum())


class Preview(nn.Module):
    """Codes to 128 px pictures from the generator's first four blocks: close enough to steer by, a quarter of the
    cost."""

    BLOCKS = 4

    def __init__(self) -> None:
        super().__init__()
        self.skip = ToImage(512, gain=1.0)
        self.layer = StyledLayer(512, 128, 1, gain=1.0)
        self.to_img = ToImage(128, gain=1.0)
        for style in (self.skip.style, self.layer.style, self.to_img.style):
            nn.init.zeros_(style.weight)
            nn.init.ones_(style.bias)
        for conv in (self.skip.conv, self.to_img.conv):
            nn.init.normal_(conv.weight, std=0.002)
            nn.init.zeros_(conv.bias)

    def features(self, generator: MobileStyleGAN, codes: Tensor) -> Tensor:
        x = generator.conv1(generator.const.expand(len(codes), -1, -1, -1), codes[:, 0])
        for i, block in enumerate(generator.blocks[: self.BLOCKS]):
            x = block(x, codes[:, 2 * i + 1], codes[:, 2 * i + 2])
        return x  # (B, 512, 64, 64)

    def forward(self, generator: MobileStyleGAN, codes: Tensor) -> Tensor:
        """(B, 16, 512) -> (B, 3, 128, 128)."""
        x = self.features(generator, codes)
        return inverse_haar(
            self.skip.bands(x, codes[:, 9]) + self.to_img.bands(self.layer(x, codes[:, 10]), codes[:, 11])
        )


def fit_preview(arguments: argparse.Namespace) -> None:
    generator = generator_256(arguments.head).to(memory_format=torch.channels_last)
    pool = Pool(arguments.folder, TRAIN_SEED, 64 * CHUNK)
    pool.refresh()
    torch.manual_seed(1)
    preview, rng = Preview().to(memory_format=torch.channels_last), np.random.default_rng(1)
    optimiser = torch.optim.Adam(preview.parameters(), lr=2e-3)
    begin, step, errors = time.monotonic(), 0, []
    while (done := (time.monotonic() - begin) / (60 * arguments.preview)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = scheduled(2e-3, step, 20, done)
        clean, codes = pool.draw(rng, 8)
        with torch.autocast("cpu", torch.bfloat16):
            out = preview(generator, codes).float()
        loss = F.mse_loss(out, F.avg_pool2d(clean, 2))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        step += 1
        errors.append(float(loss.detach()))
        if step % 50 == 0:
            print(f"preview step {step}: {10 * math.log10(4 / np.mean(errors[-50:])):.2f} dB", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(preview.state_dict(), arguments.out / "preview.safetensors")


class Trainer:
    """The networks of one training run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.generator = generator_256(arguments.head).to(memory_format=torch.channels_last)
        torch.manual_seed(0)
        self.encoder = Encoder()
        self.encoder.mean_code, self.encoder.std_code = code_statistics(self.generator)
        for layer in (self.encoder.base, *self.encoder.offsets):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        if arguments.from_embedded:
            self.encoder.load_state_dict(load_encoder().state_dict())
        self.encoder.face.network.load_state_dict(load_recogniser("mobilefacenet").state_dict())
        self.preview = Preview().requires_grad_(False)
        self.preview.load_state_dict(load_file(arguments.out / "preview.safetensors"))
        self.preview.to(memory_format=torch.channels_last)
        self.encoder.to(memory_format=torch.channels_last)
        self.recogniser = load_recogniser("mobilefacenet")

    def picture_losses(self, codes: Tensor, target: Tensor, full: bool) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = self.generator(codes).float() if full else self.preview(self.generator, codes).float()
        want = target if full else F.avg_pool2d(target, 2)
        small, small_want = F.avg_pool2d(out, 4), F.avg_pool2d(want, 4)
        pixel = F.mse_loss(out, want) + F.mse_loss(small, small_want) + 0.2 * F.l1_loss(out, want)
        geometry = ffhq_mean_geometry(len(out), out.shape[-1])
        with torch.no_grad():
            person = self.recogniser.embed_crops(target, *ffhq_mean_geometry(len(out), target.shape[-1]))
        identity = 1 - (self.recogniser.embed_crops(out, *geometry) * person).sum(1).mean()
        return pixel, identity, psnr(out.detach(), want).mean()

    def train(self) -> None:
        a, encoder = self.arguments, self.encoder
        pool = Pool(a.folder, TRAIN_SEED, a.pool)
        trained = [p for p in encoder.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=a.lr, betas=(0.9, 0.99), weight_decay=0.01)
        loop = Loop(
            a.out, "encoder", encoder, optimiser, lambda steps: np.random.default_rng([a.seed, steps]),
            rate=lambda step, done: scheduled(a.lr, step, 100, done), minutes=a.train, steps=a.steps, every=100,
        )  # fmt: skip
        scale = encoder.std_code.square().mean()
        for step, done in enumerate(loop, loop.record["steps"] - loop.before["steps"]):
            while pool.refresh() < 2 * CHUNK:
                time.sleep(5)
            encoder.train()
            clean, codes = pool.draw(loop.rng, a.batch)
            seen, target = augment(clean, loop.rng)
            seen = seen.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                normal = encoder.normalised(seen)
            pred = encoder.mean_code + encoder.std_code * normal.float()
            loss = a.code_weight * (pred - codes).square().mean() / scale
            measured = {"code": float(loss.detach()), "explained": explained(pred.detach(), codes, encoder.mean_code)}
            if a.picture_every and step % a.picture_every == 0 and done >= a.picture_from:
                full = done >= a.full_from
                n = a.picture_batch // 2 if full else a.picture_batch
                pixel, identity, db = self.picture_losses(pred[:n], target[:n], full)
                loss = loss + a.pixel_weight * pixel + a.identity_weight * identity
                measured |= {"pixel": float(pixel.detach()), "identity": float(identity.detach()), "psnr": float(db)}
            loop.step(loss, measured, a.batch)


def measure(
    encoder: Encoder,
    generator: MobileStyleGAN,
    clean: Tensor,
    codes: Tensor | None,
    landmarks: Tensor,
    boxes: Tensor,
    refine_steps: int = 0,
) -> dict[str, np.ndarray]:
    """PSNR (dB, 256 px) and recognisers' cosine of G(E(x)) against x, one number a face; code error where codes are
    known."""
    settings = InvertSettings(**InvertConfig(refine_steps=refine_steps).model_dump())
    recognisers = {name: load_recogniser(name) for name in ("mobilefacenet", "dlib_resnet", "faceres")}
    values: dict[str, list[np.ndarray]] = {}
    for i in range(0, len(clean), 8):
        part = slice(i, i + 8)
        with torch.no_grad():
            with torch.enable_grad():
                found = invert(encoder, clean[part], generator, settings)
            pred, out = found.codes, found.pictures
            values.setdefault("seconds", []).append(np.full(len(pred), found.seconds / len(pred)))
            values.setdefault("psnr", []).append(psnr(out, clean[part]).numpy())
            for name, r in recognisers.items():
                a = r.embed_crops(out, landmarks[part], boxes[part])
                b = r.embed_crops(clean[part], landmarks[part], boxes[part])
                values.setdefault(f"cosine_{name}", []).append((a * b).sum(1).numpy())
            if codes is not None:
                error = (pred - codes[part]).square().sum((1, 2)) / (codes[part] - encoder.mean_code).square().sum(
                    (1, 2)
                )
                values.setdefault("unexplained", []).append(error.numpy())
    return {k: np.concatenate(v) for k, v in values.items()}


def load_trained(folder: Path) -> Encoder:
    encoder = Encoder()
    encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
    return encoder.eval().requires_grad_(False)


def evaluate(arguments: argparse.Namespace) -> None:
    """Of the encoder in ``--out``, or of the embedded one where there is none."""
    generator = generator_256(arguments.head)
    trained = (arguments.out / "encoder.safetensors").exists()
    encoder = load_trained(arguments.out) if trained else load_encoder()
    codes = torch.stack([draw_codes(i, HELD_OUT_SEED, generator) for i in range(arguments.count)])
    with torch.no_grad():
        clean = torch.cat([generator(c).clamp(-1, 1) for c in codes.split(8)])
    sets = {"generated": (clean, codes, *ffhq_mean_geometry(len(clean), clean.shape[-1]))}
    if arguments.photos:
        from pipelines.training.real_faces import aligned_faces  # needs the detector

        clean, landmarks, boxes = aligned_faces(arguments.photos, min(256, arguments.count), seed=0)
        sets["photos"] = (clean, None, landmarks, boxes)
    report: dict[str, dict[str, float]] = {}
    for name, data in sets.items():
        for steps in (0, *arguments.refine_steps):
            some = tuple(None if t is None else t[: arguments.refine_count] for t in data) if steps else data
            values = measure(encoder, generator, *some, refine_steps=steps)
            key = f"{name}, {steps} steps" if steps else name
            report[key] = {"faces": len(some[0]), **{k: float(v.mean()) for k, v in values.items()}}
            print(key, json.dumps(report[key]), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "evaluation.json").write_text(json.dumps(report, indent=1))


def export(arguments: argparse.Namespace) -> None:
    state = load_file(arguments.out / "encoder.safetensors")
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked") and not k.startswith(TRUNK_PREFIX)}
    save_file(pack(state), arguments.export)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/encoder-data"))
    parser.add_argument("--out", type=Path, default=Path("build/encoder"))
    parser.add_argument("--head", type=Path, default=None, help="a head still in training (default: the embedded one)")
    parser.add_argument("--make", type=int, metavar="CHUNKS", help=f"render CHUNKS x {CHUNK} faces")
    parser.add_argument("--train", type=float, metavar="MINUTES")
    parser.add_argument(
        "--steps", type=int, help="train for so many steps instead, which does not depend on the machine"
    )
    parser.add_argument("--from-embedded", action="store_true", help="begin with the embedded encoder's weights")
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--export", type=Path, metavar="FILE")
    parser.add_argument("--photos", type=Path, help="folder of real photos for --evaluate")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument(
        "--refine-steps", type=int, nargs="*", default=[], help="also after so many gradient steps on W+"
    )
    parser.add_argument("--refine-count", type=int, default=32, help="faces of that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pool", type=int, default=20000, help="faces held in memory")
    parser.add_argument("--preview", type=float, metavar="MINUTES", help="fit the preview head")
    parser.add_argument("--code-weight", type=float, default=1.0)
    parser.add_argument(
        "--full-from", type=float, default=0.85, help="share of the time from which pictures are the generator's own"
    )
    parser.add_argument("--picture-every", type=int, default=1, help="picture losses every n-th step, 0 for never")
    parser.add_argument(
        "--picture-from", type=float, default=0.25, help="share of the time before picture losses begin"
    )
    parser.add_argument("--picture-batch", type=int, default=6)
    parser.add_argument("--pixel-weight", type=float, default=2.0)
    parser.add_argument("--identity-weight", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    set_up(arguments.threads)
    if arguments.make:
        make(arguments.folder, arguments.make, TRAIN_SEED, arguments.head)
    if arguments.preview:
        fit_preview(arguments)
    if arguments.train or arguments.steps:
        Trainer(arguments).train()
    if arguments.evaluate:
        evaluate(arguments)
    if arguments.export:
        export(arguments)


if __name__ == "__main__":
    main()
