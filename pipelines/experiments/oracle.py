"""Swaps by the embedded oracle (`scol_ops.swap`), where no face swapper's outputs are at hand.

Every source goes onto a generated person of its own, whose style codes are known, so that no inversion blurs the
comparison; the same one for the original and for all protected photos.  The oracle looks at sources through
MobileFaceNet: against a method that works on MobileFaceNet the figures are a white box's, and it judges no swap.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.archive.output import write_output
from pipelines.archive.paths import SourceError
from pipelines.archive.reading import read_bytes
from pipelines.archive.source import list_photos
from pipelines.evaluate.measure import Eyes, central_window
from pipelines.evaluate.pairs import stem
from pipelines.networks import load as networks
from scol_ops.metrics import to_uint8
from scol_ops.models.embedded import load_swapper
from scol_ops.models.files import SHA256
from scol_ops.models.mobilestylegan import NUM_CODES
from scol_ops.models.recognisers import ffhq_mean_geometry
from scol_ops.models.swapper import EMBEDDER
from scol_ops.paste import face_mask
from scol_ops.swap import swap
from scol_ops.warp import GeometryError

GENERATOR = "mobilestylegan-256"
TRUNCATION = 0.7
VERSION = "1"


@dataclass
class Swapped:
    """A tree of swaps: how many it holds, how many were made now, and the reasons of sources that cannot be swapped."""

    swaps: int = 0
    made: int = 0
    failed: dict[str, str] = field(default_factory=dict)


class Oracle:
    """The networks, and a generated target for each name.

    Args:
        seed: of the targets.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        WeightsError: embedded files are missing or altered.
    """

    def __init__(self, seed: int = 0, device: str = "auto") -> None:
        self.seed = seed
        self.eyes = Eyes((EMBEDDER,), device)
        self.generator = networks.generator(GENERATOR, self.eyes.device)
        self.mapper = load_swapper(self.eyes.device)
        self.fingerprint = "/".join(
            (
                VERSION,
                str(seed),
                *(SHA256[f"{n}.safetensors"][:16] for n in ("swapper", EMBEDDER, "mobilestylegan_head256")),
            )
        )

    def target(self, name: str) -> Tensor:
        """Codes (1, 16, 512) of the person onto whom the source of this name goes."""
        number = int.from_bytes(hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest())
        z = torch.randn(1, 512, generator=torch.Generator().manual_seed(number)).to(self.eyes.device)
        w = self.generator.truncate(self.generator.mapping(z), TRUNCATION)
        return w[:, None].repeat(1, NUM_CODES, 1)

    def swap(self, url: str, name: str) -> tuple[np.ndarray | None, str | None]:
        """uint8 (256, 256, 3): the target of this name with the identity of a photo's middle face, over the target
        by its mask; or None and the reason."""
        window, reason = central_window(self.eyes, url)
        if window is None:
            return None, reason
        device = self.eyes.device
        with torch.no_grad():
            identity = torch.from_numpy(self.eyes.embed([window])[0]).to(device)
            codes = self.target(name)
            target = self.generator(codes).clamp(-1, 1)
            mask = face_mask(ffhq_mean_geometry(1, target.shape[-1])[0]).to(device)
            return to_uint8(swap(target, codes, identity, self.mapper, self.generator, mask).pictures[0]), None


def _remember(record: Path, digests: Mapping[str, str]) -> None:
    write_output(str(record.parent), record.name, (json.dumps(digests, indent=1) + "\n").encode())


def make_swaps(oracle: Oracle, sources: str | Path, folder: str | Path) -> Swapped:
    """Swap every source of a tree: `FOLDER/PERSON/x.png` from `SOURCES/PERSON/x.jpg`.

    `FOLDER.json` says which bytes each was made from: sources that have not changed are not swapped again, and swaps of
    sources that are gone are removed.

    Raises:
        SourceError: a folder that cannot be listed. OutputError: one that cannot be written.
    """
    folder = Path(folder)
    record = folder.with_name(folder.name + ".json")
    known = json.loads(record.read_text()) if record.exists() else {}
    kept: dict[str, str] = {}
    result = Swapped()
    for row in list_photos(str(sources)):
        name = stem(row.path)
        if row.error is not None:
            result.failed[name] = str(row.error)
            continue
        try:
            digest = hashlib.blake2b(oracle.fingerprint.encode() + read_bytes(row.url), digest_size=16).hexdigest()
        except SourceError as error:
            result.failed[name] = str(error)
            continue
        if known.get(name) != digest or not (folder / f"{name}.png").exists():
            if known.pop(name, None) is not None:  # before the file is another one: whoever stops here made neither
                _remember(record, known)
            try:
                picture, reason = oracle.swap(row.url, name)
            except GeometryError as error:
                picture, reason = None, f"GEOMETRY: {error}"
            if picture is None:
                result.failed[name] = str(reason)
                continue
            stream = io.BytesIO()
            Image.fromarray(picture).save(stream, "PNG")
            write_output(str(folder), f"{name}.png", stream.getvalue())
            result.made += 1
            known[name] = digest
            _remember(record, known)
        kept[name] = digest
    for path in folder.rglob("*.png") if folder.exists() else ():
        if path.relative_to(folder).as_posix().removesuffix(".png") not in kept:
            path.unlink()
    _remember(record, kept)
    result.swaps = len(kept)
    return result
