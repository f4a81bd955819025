"""Train the swap oracle's mapper on generated faces: ``python -m pipelines.training.train_swapper``.

``--layers`` tells which of the generator's codes carry identity: those of one generated person in another one's, judged
by three recognisers.  ``--make`` embeds the pictures that ``train_encoder --make`` rendered (half plain W, half
style-mixed), clean and as a camera and an upload would deliver them; ``--train MINUTES`` (of this process' own time)
begins with a ridge regression from embeddings to codes, whose answers, shrunk towards the mean, are stretched again,
then adds the identity loss: codes into a random other person's, rendered by ``train_encoder``'s preview (in the end by
the generator), half of them over the target by its mask, and embedded again.  Embeddings are those of damaged pictures,
with noise, and mixtures of two people's, so that real photos' are no surprise.  Only generated pictures are read.

A run that was cut off goes on from its checkpoint;
``--export`` writes the packed file that is embedded.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster.files import replacing
from pipelines.training.loop import Loop, scheduled
from pipelines.training.train_encoder import TRAIN_SEED, Preview, augment, code_statistics
from scol_ops.detection import FaceDetector
from scol_ops.metrics import to_uint8
from scol_ops.models.embedded import RECOGNISERS, load_mobilestylegan, load_recogniser
from scol_ops.models.files import pack
from scol_ops.models.mobilestylegan import NUM_CODES
from scol_ops.models.recognisers import ffhq_mean_geometry
from scol_ops.models.swapper import EMBEDDER, EMBEDDING_DIM, FIRST, LAST, Swapper
from scol_ops.paste import face_mask
from scol_ops.runtime import set_up

COARSE = 16  # side of the pictures by which the target's layout is kept
PAIRS = 8  # swaps a step


def make(folder: Path, faces: Path) -> None:
    """Embeddings of all pictures in ``faces``: (n, 2, 192), clean and damaged, with codes and coarse pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    network = load_recogniser(EMBEDDER).to(memory_format=torch.channels_last)
    for path in sorted(faces.glob(f"{TRAIN_SEED}-*.npz")):
        out = folder / path.name
        if out.exists():
            continue
        with np.load(path, allow_pickle=False) as arrays:
            pictures = torch.from_numpy(arrays["pictures"]).float() / 127.5 - 1
            codes = arrays["codes"]
        rng = np.random.default_rng([21, int(path.stem.split("-")[1])])
        embeddings = []
        with torch.no_grad():
            for clean in pictures.split(16):
                geometry = ffhq_mean_geometry(len(clean), clean.shape[-1])
                seen = augment(clean, rng)[0]
                embeddings.append(torch.stack([network.embed_crops(x, *geometry) for x in (clean, seen)], 1))
        coarse = F.interpolate(pictures, (COARSE, COARSE), mode="area")
        with replacing(out) as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                embeddings=torch.cat(embeddings).numpy().astype(np.float16),
                codes=codes,
                coarse=coarse.numpy().astype(np.float16),
            )


class People:
    """All chunks of ``make`` in memory."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob(f"{TRAIN_SEED}-*.npz"))
        if not paths:
            raise SystemExit(f"no data in {folder}: --make first")
        arrays = [np.load(path, allow_pickle=False) for path in paths]
        self.embeddings, self.codes, self.coarse = (
            torch.from_numpy(np.concatenate([a[name] for a in arrays])) for name in ("embeddings", "codes", "coarse")
        )

    def __len__(self) -> int:
        return len(self.codes)

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (count, 2, 192), codes (count, 16, 512), coarse pictures (count, 3, 16, 16)."""
        index = torch.from_numpy(rng.integers(0, len(self), size=count))
        return self.embeddings[index].float(), self.codes[index].float(), self.coarse[index].float()


def seen_embedding(embeddings: Tensor, rng: np.random.Generator, most: float = 0.7) -> Tensor:
    """What a swapper is given of (B, 2, 192): clean or damaged, and noise of up to ``most`` times the norm."""
    batch, views, dim = embeddings.shape
    chosen = embeddings[torch.arange(batch), torch.from_numpy(rng.integers(0, views, size=batch))]
    noise = torch.from_numpy(rng.standard_normal((batch, dim)).astype(np.float32)) / dim**0.5
    return F.normalize(
        chosen + noise * torch.from_numpy(rng.uniform(0, most, size=(batch, 1)).astype(np.float32)), dim=1
    )


class Trainer:
    """The networks and people of one training run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.generator = load_mobilestylegan(256).to(memory_format=torch.channels_last)
        self.recogniser = load_recogniser(EMBEDDER).to(memory_format=torch.channels_last)
        torch.manual_seed(0)
        self.network = Swapper()
        self.network.mean_code, self.network.std_code = code_statistics(self.generator)
        nn.init.zeros_(self.network.leave.weight)
        nn.init.zeros_(self.network.leave.bias)
        self.people = People(arguments.folder)
        self.regress()
        self.mask = face_mask(ffhq_mean_geometry(1, 256)[0])
        self.preview = Preview().requires_grad_(False)
        self.preview.load_state_dict(load_file(arguments.preview))
        self.preview.to(memory_format=torch.channels_last)

    def regress(self) -> None:
        """The linear part: ridge regression of the codes."""
        given = (self.people.embeddings.float() * EMBEDDING_DIM**0.5).transpose(0, 1).flatten(0, 1)
        codes = ((self.people.codes[:, FIRST:LAST].float() - self.network.mean_code) / self.network.std_code).flatten(1)
        mean = codes.mean(0)
        goal = (codes - mean).repeat(2, 1)
        ridge = self.arguments.ridge * len(given) * torch.eye(EMBEDDING_DIM)
        weight = torch.linalg.solve(given.T @ given + ridge, given.T @ goal)
        share = float(1 - (goal - given @ weight).square().sum() / goal.square().sum())
        print(f"regression explains {share:.3f} of the codes' variance", flush=True)
        self.network.linear.weight.data.copy_(self.arguments.stretch * weight.T)
        self.network.linear.bias.data.copy_(mean)

    def swaps(self, rng: np.random.Generator, full: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of identity, of the target's layout, and of the distance from the generator's own codes."""
        count = PAIRS // 2 if full else PAIRS
        embeddings, own, _ = self.people.draw(rng, count)
        goal = embeddings[:, 0]
        given = seen_embedding(embeddings, rng)
        # A quarter are people between two: real faces' embeddings lie where no generated one does.
        mixed = torch.from_numpy(rng.uniform(size=(count, 1)) < 0.25)
        between = F.normalize(goal + goal.roll(1, 0) * float(rng.uniform(0.3, 1)), dim=1)
        goal, given = torch.where(mixed, between, goal), torch.where(mixed, between, given)
        _, codes, coarse = self.people.draw(rng, count)
        pred = self.network(given)
        mixture = torch.cat([codes[:, :FIRST], pred, codes[:, LAST:]], 1)

        def render(codes: Tensor) -> Tensor:
            return self.generator(codes) if full else self.preview(self.generator, codes)

        with torch.autocast("cpu", torch.bfloat16):
            out = render(mixture)
            half = count // 2  # over the target by its mask
            with torch.no_grad():
                target = render(codes[:half])
            mask = self.mask if full else F.avg_pool2d(self.mask, 2)
            out = torch.cat([target + mask * (out[:half] - target), out[half:]])
            found = self.recogniser.embed_crops(out.float(), *ffhq_mean_geometry(count, out.shape[-1]))
        identity = 1 - (F.normalize(found.float(), dim=1) * goal).sum(1).mean()
        layout = F.mse_loss(F.interpolate(out.float(), (COARSE, COARSE), mode="area"), coarse)
        code = (pred - own[:, FIRST:LAST]).square()[~mixed[:, 0]].sum() / (
            pred.numel() * self.network.std_code.square().mean()
        )
        return identity, layout, code

    def train(self) -> None:
        a = self.arguments
        print(f"{len(self.people)} people", flush=True)
        optimiser = torch.optim.AdamW(self.network.parameters(), lr=a.lr, betas=(0.9, 0.99), weight_decay=0.01)
        loop = Loop(
            a.out, "swapper", self.network, optimiser, lambda steps: np.random.default_rng([a.seed, steps]),
            rate=lambda step, done: scheduled(a.lr, step, 10, done), minutes=a.train, steps=a.steps, count="swaps",
            decay=(0.98, 10), every=25, clock=time.process_time, in_all=True,
        )  # fmt: skip
        for done in loop:
            full = done >= a.full_from
            identity, layout, code = self.swaps(loop.rng, full)
            loss = identity + a.layout_weight * layout + a.code_weight * code
            measured = {n: float(v.detach()) for n, v in (("identity", identity), ("layout", layout), ("code", code))}
            loop.step(loss, measured, PAIRS // 2 if full else PAIRS)


def layers(count: int, ranges: list[tuple[int, int]], seed: int = 123) -> dict[str, dict[str, float]]:
    """One person's codes i .. j - 1 in another's: cosines to both, and how much of the target's picture stays.

    Returns:
        "i-j" -> per recogniser its mean cosine to source and target, the share nearer the source and the share accepted
        as the source; root mean square difference to the target's picture ([0, 1] units), whole and at the crop's rim;
        correlation over pairs of the nose's place across the face with the target's and the source's.
    """

    generator = load_mobilestylegan(256)
    recognisers = [load_recogniser(name) for name in RECOGNISERS]
    detector = FaceDetector()
    z = torch.randn(2 * count, 512, generator=torch.Generator().manual_seed(seed))
    geometry = ffhq_mean_geometry(count, 256)
    rim = torch.zeros(256, 256, dtype=torch.bool)
    rim[:20], rim[:, :20], rim[:, -20:] = True, True, True

    def render(codes: Tensor) -> Tensor:
        return torch.cat([generator(c).clamp(-1, 1) for c in codes.split(8)])

    def yaw(pictures: Tensor) -> np.ndarray:
        """Nose's distance from the middle of the eyes along their line, over the distance of the eyes; NaN: no face."""
        values = []
        for faces in detector.detect(list(to_uint8(pictures))):
            if not faces:
                values.append(np.nan)
                continue
            left, right, nose = faces[0].landmarks[:3].astype(float)
            across = right - left
            values.append(float((nose - (left + right) / 2) @ across / (across @ across)))
        return np.array(values)

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        known = np.isfinite(a) & np.isfinite(b)
        return float(np.corrcoef(a[known], b[known])[0, 1])

    report: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        w = generator.truncate(generator.mapping(z), 0.75)
        sources, targets = (x[:, None].repeat(1, NUM_CODES, 1) for x in w.split(count))
        pictures = render(sources), render(targets)
        known = [[r.embed_crops(p, *geometry) for p in pictures] for r in recognisers]
        yaws = yaw(pictures[0]), yaw(pictures[1])
        for first, last in ranges:
            codes = targets.clone()
            codes[:, first:last] = sources[:, first:last]
            swapped = render(codes)
            error = ((swapped - pictures[1]) / 2).square().mean(1)
            row = {"rms": float(error.mean().sqrt()), "rms rim": float(error[:, rim].mean().sqrt())}
            turned = yaw(swapped)
            row |= {"pose as target": correlation(turned, yaws[1]), "pose as source": correlation(turned, yaws[0])}
            for network, (source, target) in zip(recognisers, known, strict=True):
                found = network.embed_crops(swapped, *geometry)
                a, b = (found * source).sum(1), (found * target).sum(1)
                row |= {
                    f"{network.name} source": float(a.mean()),
                    f"{network.name} target": float(b.mean()),
                    f"{network.name} nearer": float((a > b).float().mean()),
                    f"{network.name} accepted": float((a > network.threshold).float().mean()),
                }
            report[f"{first}-{last}"] = row
            print(f"{first}-{last}", json.dumps({k: round(v, 3) for k, v in row.items()}), flush=True)
    return report


def export(arguments: argparse.Namespace) -> None:
    save_file(pack(load_file(arguments.out / "swapper.safetensors")), arguments.export)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--faces", type=Path, default=Path("build/encoder-data"), help="pictures of train_encoder --make"
    )
    parser.add_argument(
        "--preview", type=Path, default=Path("build/encoder/preview.safetensors"), help="of train_encoder"
    )
    parser.add_argument("--folder", type=Path, default=Path("build/swapper-data"))
    parser.add_argument("--out", type=Path, default=Path("build/swapper"))
    parser.add_argument("--layers", type=int, metavar="PAIRS", help="measure which codes carry identity")
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--train", type=float, metavar="MINUTES", help="in all: what earlier runs took counts")
    parser.add_argument("--steps", type=int, help="train for so many steps in all instead, whatever the machine")
    parser.add_argument("--export", type=Path, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument(
        "--full-from", type=float, default=0.9, help="share of the time from which pictures are the generator's own"
    )
    parser.add_argument("--ridge", type=float, default=0.03, help="as a share of the embeddings' variance")
    parser.add_argument("--stretch", type=float, default=1.6, help="of the regression's answers, away from the mean")
    parser.add_argument("--code-weight", type=float, default=0.05)
    parser.add_argument("--layout-weight", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    set_up(arguments.threads)
    if arguments.layers:
        ranges = [(0, 16), (1, 10), (2, 8), (2, 10), (2, 12), (3, 10), (4, 10), (4, 12), (6, 12)]
        report = layers(arguments.layers, ranges)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "layers.json").write_text(json.dumps(report, indent=1))
    if arguments.make:
        make(arguments.folder, arguments.faces)
    if arguments.train or arguments.steps:
        Trainer(arguments).train()
    if arguments.export:
        export(arguments)


if __name__ == "__main__":
    main()
