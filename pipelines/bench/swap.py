"""Benchmark of the swap oracle: whose identity has a swap?

    python -m pipelines.bench.swap [--photos LFW] [--pairs 64] [--seed 0]

Pairs of generated people that were never trained on, and of people of LFW (``--photos``, unprotected).  The source's
embedding goes onto the target, as the picture that is rendered, or over the target by the mask of its face; recognisers
then compare the swap with source and target.  MobileFaceNet is the oracle's own eye: dlib's network and faceres judge.
A generated target's codes are known, a photo's are the embedded encoder's.  "another photo" is one of the source
that the oracle has not seen; "target accepted" is the share of targets that pass for the source before any swap, which
tells what the threshold (1 % false accepts over LFW's pairs) is worth on these people.  Prints a table and writes
build/bench/swap.json.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipelines.archive.reading import read_bytes
from pipelines.bench.harness import draw_people, parse, record
from pipelines.experiments.datasets import DatasetError, read_dataset
from pipelines.experiments.protocol import choose
from pipelines.photos.codec import decode
from pipelines.run.text_tables import markdown, number
from pipelines.training.real_faces import largest_faces
from scol_ops.detection import FaceDetector
from scol_ops.inversion import invert
from scol_ops.models.embedded import RECOGNISERS, load_encoder, load_mobilestylegan, load_recogniser, load_swapper
from scol_ops.models.recognisers import Recogniser, ffhq_mean_geometry
from scol_ops.models.swapper import EMBEDDER
from scol_ops.paste import face_mask
from scol_ops.runtime import set_up
from scol_ops.swap import swap

# Head, key, digits, scale
COLUMNS = (
    ("nearer the source, %", "nearer", 1, 100), ("accepted as source, %", "accepted", 1, 100),
    ("as source's other photo, %", "mate_accepted", 1, 100), ("target accepted, %", "target_accepted", 1, 100),
    ("cosine to source", "source", 3, 1), ("to other photo", "mate", 3, 1), ("to target", "target", 3, 1),
    ("source to target", "strangers", 3, 1),
)  # fmt: skip


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
        parts = zip(crops.split(8), self.landmarks.split(8), self.boxes.split(8), strict=True)
        return torch.cat([network.embed_crops(*part) for part in parts])


def photographed(paths: list[Path], detector: FaceDetector) -> tuple[Faces, list[int]]:
    """The largest face of each photo, and the indices of the photos that show one."""
    found, *faces = zip(*largest_faces((decode(read_bytes(str(p))).pixels for p in paths), detector), strict=True)
    return Faces(*map(torch.stack, faces)), list(found)


class Oracle:
    """The oracle and its judges."""

    def __init__(self) -> None:
        self.generator, self.mapper, self.encoder = load_mobilestylegan(256), load_swapper(), load_encoder()
        self.networks = {name: load_recogniser(name) for name in RECOGNISERS}

    def generated(self, count: int, seed: int) -> Faces:
        """So many people who do not exist."""
        codes, crops = draw_people(count, seed, self.generator)
        return Faces(crops, *ffhq_mean_geometry(count, crops.shape[-1]), codes)

    def measure(self, sources: Faces, targets: Faces, masked: bool, mates: Faces | None = None) -> dict:
        """Sources onto targets, one by one; by recogniser see the table."""
        identity = sources.embed(self.networks[EMBEDDER])
        codes = targets.codes
        if codes is None:
            codes = invert(self.encoder, targets.crops, self.generator).codes
        masks = face_mask(targets.landmarks).split(1) if masked else [None] * len(codes)
        begin = time.monotonic()
        each = zip(targets.crops.split(1), codes.split(1), identity.split(1), masks, strict=True)
        pictures = torch.cat([swap(*three, self.mapper, self.generator, mask).pictures for *three, mask in each])
        row: dict[str, object] = {"pairs": len(codes), "seconds": (time.monotonic() - begin) / len(codes)}
        for name, network in self.networks.items():
            of_source, of_target = sources.embed(network), targets.embed(network)
            of_swap = targets.embed(network, pictures)
            cosines = {"source": (of_swap * of_source).sum(1), "target": (of_swap * of_target).sum(1)}
            cosines["strangers"] = (of_source * of_target).sum(1)
            if mates is not None:
                cosines["mate"] = (of_swap * mates.embed(network)).sum(1)
            row[name] = {key: float(cosine.mean()) for key, cosine in cosines.items()}
            row[name] |= {"nearer": float((cosines["source"] > cosines["target"]).float().mean())}
            for key, of in (("accepted", "source"), ("target_accepted", "strangers"), ("mate_accepted", "mate")):
                if of in cosines:
                    row[name][key] = float((cosines[of] > network.threshold).float().mean())
            row[name]["threshold"] = network.threshold
        return row


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


def table(rows: dict[str, dict[str, dict]]) -> str:
    """Markdown: a line for each kind of pair and recogniser."""
    lines = [["source on target", "recogniser", *(column[0] for column in COLUMNS)]]
    for name, row in rows.items():
        for network in RECOGNISERS:
            found = row[network]
            lines.append([name, network, *(number(found.get(key), *form) for _, key, *form in COLUMNS)])
    return markdown(lines)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    options = parse(
        "swap", __doc__, argv, photos={"type": Path, "help": "LFW; without it, generated people only"},
        pairs=(64, ""), seed=(0, ""),
    )  # fmt: skip
    set_up()
    oracle = Oracle()
    sources, targets = (oracle.generated(options.pairs, 900_000 + 2 * options.seed + i) for i in (0, 1))
    pairs = {"generated on generated": (sources, targets, None)}
    if options.photos is not None:
        try:
            photos, mates = people(options.photos, 2 * options.pairs, options.seed, FaceDetector())
        except DatasetError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        half = len(photos.crops) // 2
        first = slice(0, half)
        own, other, onto = photos.part(first), mates.part(first), targets.part(first)
        pairs["LFW on generated"] = own, onto, other
        pairs["LFW on LFW"] = own, photos.part(slice(half, 2 * half)), other
    rows = {}
    for name, (sources, targets, mates) in pairs.items():
        for masked in (False, True):
            rows[f"{name}{', masked' if masked else ''}"] = oracle.measure(sources, targets, masked, mates)
    print(table(rows))
    record(options.out, {"bench": "swap", "pairs": options.pairs, "seed": options.seed, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
