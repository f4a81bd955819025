"""Benchmark of the swap oracle: whose identity has a swap?

    python -m pipelines.bench.bench_swap [--photos LFW] [--pairs 64] [--seed 0]

Pairs of generated people that were never trained on, and of people of LFW (``--photos``, unprotected).  The source's
embedding goes onto the target, as the picture that is rendered, or over the target by the mask of its face; recognisers
then compare the swap with source and target.  MobileFaceNet is the oracle's own eye: dlib's network and faceres judge.
A generated target's codes are known, a photo's are the embedded encoder's.  "another photo" is one of the source
that the oracle has not seen; "target accepted" is the share of targets that pass for the source before any swap, which
tells what the threshold (1 % false accepts over LFW's pairs) is worth on these people.  Prints a table and writes
build/bench/swap.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipelines.archive.reading import read_bytes
from pipelines.evaluate.page import plain_table
from pipelines.experiments.datasets import DatasetError, read_dataset
from pipelines.experiments.protocol import choose
from pipelines.photos.codec import decode
from pipelines.run.environment import machine
from scol_ops.alignment import align
from scol_ops.detection import FaceDetector
from scol_ops.inversion import invert
from scol_ops.models.embedded import RECOGNISERS, load_encoder, load_mobilestylegan, load_recogniser, load_swapper
from scol_ops.models.mobilestylegan import NUM_CODES, MobileStyleGAN
from scol_ops.models.recognisers import Recogniser, ffhq_mean_geometry
from scol_ops.models.swapper import EMBEDDER
from scol_ops.paste import face_mask
from scol_ops.runtime import set_up
from scol_ops.swap import swap
from scol_ops.warp import crop_transform, invert_affine, transform_boxes

TRUNCATION = 0.7


@dataclass(frozen=True, eq=False)
class Faces:
    """Crops (N, 3, 256, 256), landmarks (N, 5, 2) and boxes (N, 4) in them, and codes (N, 16, 512) where known."""

    crops: Tensor
    landmarks: Tensor
    boxes: Tensor
    codes: Tensor | None = None

    def part(self, which: slice | list[int]) -> Faces:
        """Some of them."""
        return Faces(*(None if t is None else t[which] for t in (self.crops, self.landmarks, self.boxes, self.codes)))

    def embed(self, network: Recogniser, crops: Tensor | None = None) -> Tensor:
        """(N, dim): of these faces, or of other pictures with faces in these places."""
        crops = self.crops if crops is None else crops
        return torch.cat([
            network.embed_crops(c, lm, b)
            for c, lm, b in zip(crops.split(8), self.landmarks.split(8), self.boxes.split(8), strict=True)
        ])


def generated(count: int, seed: int, generator: MobileStyleGAN) -> Faces:
    """Plain codes of ``count`` people who do not exist."""
    z = torch.randn(count, 512, generator=torch.Generator().manual_seed(seed))
    codes = generator.truncate(generator.mapping(z), TRUNCATION)[:, None].repeat(1, NUM_CODES, 1)
    crops = torch.cat([generator(c).clamp(-1, 1) for c in codes.split(8)])
    return Faces(crops, *ffhq_mean_geometry(count, crops.shape[-1]), codes)


def photographed(paths: list[Path], detector: FaceDetector) -> tuple[Faces, list[int]]:
    """The largest face of each photo, and the indices of the photos that show one."""
    crops, landmarks, boxes, found = [], [], [], []
    for index, path in enumerate(paths):
        pixels = decode(read_bytes(str(path))).pixels
        faces = detector.detect([pixels])[0]
        if not faces:
            continue
        aligned = align(pixels, faces[0].landmarks)
        to_crop = invert_affine(crop_transform(aligned.quads[0], aligned.size))
        crops.append(aligned.crops)
        landmarks.append(aligned.landmarks)
        boxes.append(transform_boxes(torch.from_numpy(faces[0].box)[None].double(), to_crop).float())
        found.append(index)
    return Faces(torch.cat(crops), torch.cat(landmarks), torch.cat(boxes)), found


class Bench:
    """The oracle and its judges."""

    def __init__(self) -> None:
        self.generator, self.mapper, self.encoder = load_mobilestylegan(256), load_swapper(), load_encoder()
        self.networks = {name: load_recogniser(name) for name in RECOGNISERS}

    def measure(self, sources: Faces, targets: Faces, masked: bool, mates: Faces | None = None) -> dict:
        """Sources onto targets, one by one; by recogniser see the table."""
        identity = sources.embed(self.networks[EMBEDDER])
        codes = targets.codes
        if codes is None:
            codes = invert(self.encoder, targets.crops, self.generator).codes
        masks = face_mask(targets.landmarks) if masked else [None] * len(codes)
        begin = time.monotonic()
        pictures = torch.cat([
            swap(targets.crops[i : i + 1], codes[i : i + 1], identity[i : i + 1], self.mapper, self.generator,
                 None if masks[i] is None else masks[i][None]).pictures
            for i in range(len(codes))
        ])  # fmt: skip
        row: dict[str, object] = {"pairs": len(codes), "seconds": (time.monotonic() - begin) / len(codes)}
        for name, network in self.networks.items():
            of_source, of_target = sources.embed(network), targets.embed(network)
            of_swap = targets.embed(network, pictures)
            to_source, to_target = (of_swap * of_source).sum(1), (of_swap * of_target).sum(1)
            strangers = (of_source * of_target).sum(1)
            row[name] = {
                "source": float(to_source.mean()),
                "target": float(to_target.mean()),
                "strangers": float(strangers.mean()),
                "nearer": float((to_source > to_target).float().mean()),
                "accepted": float((to_source > network.threshold).float().mean()),
                "target_accepted": float((strangers > network.threshold).float().mean()),
                "threshold": network.threshold,
            }
            if mates is not None:
                to_mate = (of_swap * mates.embed(network)).sum(1)
                accepted = float((to_mate > network.threshold).float().mean())
                row[name] |= {"mate": float(to_mate.mean()), "mate_accepted": accepted}
        return row


def table(rows: dict[str, dict[str, object]]) -> str:
    """Markdown: a line for each kind of pair and recogniser."""
    head = (
        "source on target", "recogniser", "nearer the source, %", "accepted as source, %", "as source's other photo, %",
        "target accepted, %", "cosine to source", "to other photo", "to target", "source to target",
    )  # fmt: skip
    lines = [head]
    for name, row in rows.items():
        for network in RECOGNISERS:
            found = row[network]
            lines.append((
                name, network, f"{100 * found['nearer']:.1f}", f"{100 * found['accepted']:.1f}",
                f"{100 * found['mate_accepted']:.1f}" if "mate" in found else "-", f"{100 * found['target_accepted']:.1f}",
                f"{found['source']:.3f}", f"{found['mate']:.3f}" if "mate" in found else "-",
                f"{found['target']:.3f}", f"{found['strangers']:.3f}",
            ))  # fmt: skip
    return plain_table(lines)


def people(root: Path, count: int, seed: int, detector: FaceDetector) -> tuple[Faces, Faces]:
    """One photo each of so many people of LFW, and another one of each.

    Raises:
        DatasetError: there are not so many.
    """
    # Some photos show no face to the detector: a few people more are drawn.
    protocol = choose(read_dataset("lfw", root), count + 8, 0, seed)
    names = list(protocol.probes)
    first, a = photographed([root / protocol.probes[n] for n in names], detector)
    second, b = photographed([root / protocol.mates[n] for n in names], detector)
    both = sorted(set(a) & set(b))[:count]
    return first.part([a.index(i) for i in both]), second.part([b.index(i) for i in both])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="LFW; without it, generated people only")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("build/bench/swap.json"))
    options = parser.parse_args(argv)
    set_up()
    bench, rows = Bench(), {}
    with torch.no_grad():
        sources, targets = (generated(options.pairs, 900_000 + 2 * options.seed + i, bench.generator) for i in (0, 1))
        for masked in (False, True):
            rows[f"generated on generated{', masked' if masked else ''}"] = bench.measure(sources, targets, masked)
        if options.photos is not None:
            try:
                photos, mates = people(options.photos, 2 * options.pairs, options.seed, FaceDetector())
            except DatasetError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            half = len(photos.crops) // 2
            first, second = slice(0, half), slice(half, 2 * half)
            own, other, onto = photos.part(first), mates.part(first), targets.part(first)
            for masked in (False, True):
                name = ", masked" if masked else ""
                rows[f"LFW on generated{name}"] = bench.measure(own, onto, masked, other)
                rows[f"LFW on LFW{name}"] = bench.measure(own, photos.part(second), masked, other)
    print(table(rows))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    about = {"bench": "swap", "pairs": options.pairs, "seed": options.seed}
    options.json.write_text(json.dumps({**about, "rows": rows, "machine": machine()}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
