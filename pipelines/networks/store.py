"""The model store: networks that users bring, converted to safetensors, with what is known of them beside.

A folder or fsspec URL (``$SCOL_MODELS``, else the user's cache folder) that every node reads:

    NAME.safetensors    the network (``scol_ops.models.checkpoints.pack``)
    NAME.json           what it is: see ``Record``

Records are small and are read when a run is planned; the networks, and their digests, when a worker loads one.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cluster.errors import BadUrlError
from cluster.files import Files
from pipelines.networks.digests import embedded_w_digest
from scol_ops.metrics import to_uint8
from scol_ops.models import checkpoints, w_space
from scol_ops.models.catalogue import PublicModel, card_of
from scol_ops.models.checkpoints import CheckpointError, Loaded
from scol_ops.models.embedded import load_mobilestylegan
from scol_ops.models.files import WeightsError
from scol_ops.models.recognisers import Recogniser, ffhq_mean_geometry

VARIABLE = "SCOL_MODELS"
_PROBE_WIDTH = 64  # numbers of each probe vector that a record keeps


class ModelStoreError(WeightsError):
    """The model store, or a model in it, cannot be used. `str()` is words for people."""


class MissingModelError(ModelStoreError):
    """A model that a run needs is not in the store; the words say where its owner publishes it."""

    def __init__(self, name: str, url: str) -> None:
        card = card_of(name)
        super().__init__(
            f"the model {name!r} is not in the model store {url}. {card.what}: {card.published}; licence: "
            f"{card.licence}; "
            f"usual file: {card.file} ({card.megabytes:g} MB). Fetch it, then: scol models add {name} FILE. "
            f"Instead: {card.instead}"
        )
        self.name = name


@dataclass
class Record:
    """What the store knows of a model.

    Attributes:
        name: as in the configuration.
        family: key of ``checkpoints.FAMILIES``.
        facts: what its constructor takes.
        sha256: of NAME.safetensors; its first 16 digits are the model's fingerprint.
        source: base name of the file that it came from.
        source_sha256, source_bytes: of that file.
        layout: form of that file: ``zip``, ``stream``, ``pickle``, ``safetensors``.
        skipped: code in that file that was not run, by name.
        digest: ``published`` where the owner's digest is known and agrees, else ``unknown``.
        notes: words on what the file lacked.
        parameters: count.
        codes: L of generators and encoders.
        w_probe: of its mapping network (``w_space.probe``, the first numbers); None where it has none.
        w_fingerprint: of its W space: equal for models that can share a gallery.
        check: what the self-check saw.
        added: UTC, ISO 8601.
    """

    name: str
    family: str
    facts: dict[str, Any]
    sha256: str
    source: str
    source_sha256: str
    source_bytes: int
    layout: str
    skipped: dict[str, int]
    digest: str
    notes: list[str]
    parameters: int
    codes: int | None = None
    w_probe: list[list[float]] | None = None
    w_fingerprint: str | None = None
    check: dict[str, Any] = field(default_factory=dict)
    added: str = ""

    @property
    def fingerprint(self) -> str:
        return self.sha256[:16]


def default_url() -> str:
    """``$SCOL_MODELS``, else ``scol/models`` in the user's cache folder (``$XDG_CACHE_HOME``, else ``~/.cache``)."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return os.environ.get(VARIABLE) or str(Path(cache) / "scol" / "models")


class ModelStore:
    """A model store.

    Args:
        url: folder or fsspec URL; None for ``default_url()``. It need not exist.

    Raises:
        ModelStoreError: the URL cannot be opened.
    """

    def __init__(self, url: str | None = None) -> None:
        self._files = _files(url or default_url())
        self.url = self._files.url

    def read(self, file: str) -> bytes:
        """Content of a file in the store.

        Raises:
            FileNotFoundError: there is none.
            ModelStoreError: it cannot be read.
        """
        try:
            return self._files.read(file)
        except FileNotFoundError:
            raise
        except Exception as error:  # every back end has errors of its own
            raise ModelStoreError(f"cannot read {file} in the model store {self.url}: {error}") from error

    def _write(self, file: str, content: bytes) -> None:
        try:
            self._files.write(file, content)
        except Exception as error:
            raise ModelStoreError(f"cannot write {file} to the model store {self.url}: {error}") from error

    def names(self) -> list[str]:
        """Names of the models here, sorted; none where the folder does not exist."""
        try:
            found = self._files.list()
        except Exception as error:
            raise ModelStoreError(f"cannot list the model store {self.url}: {error}") from error
        return [f.removesuffix(".json") for f, _ in found if f.endswith(".json") and not f.startswith(".")]

    def has(self, name: str) -> bool:
        """Whether a model is here."""
        try:
            return self._files.has(f"{name}.json")
        except Exception as error:
            raise ModelStoreError(f"cannot look into the model store {self.url}: {error}") from error

    def record(self, name: str) -> Record:
        """What is known of a model.

        Raises:
            MissingModelError: it is not here.
            ModelStoreError: unknown name, or a record that cannot be read.
        """
        _known(name)
        try:
            return Record(**json.loads(self.read(f"{name}.json")))
        except FileNotFoundError:
            raise MissingModelError(name, self.url) from None
        except (ValueError, TypeError) as error:
            raise ModelStoreError(f"{name}.json in {self.url} is no record of a model: {error}") from error

    def content(self, name: str) -> bytes:
        """NAME.safetensors, its digest checked against the record.

        Raises:
            MissingModelError, ModelStoreError: see ``record``; also where the file was altered or is gone.
        """
        record = self.record(name)
        try:
            content = self.read(f"{name}.safetensors")
        except FileNotFoundError:
            raise ModelStoreError(f"{name}.safetensors is gone from {self.url}: scol models add {name} FILE") from None
        digest = hashlib.sha256(content).hexdigest()
        if digest != record.sha256:
            raise ModelStoreError(
                f"{name}.safetensors in {self.url} has sha256 {digest}, its record says {record.sha256}: refused"
            )
        return content

    def load(self, name: str) -> Loaded:
        """A network, in eval mode, parameters frozen, on the CPU.

        Raises:
            MissingModelError, ModelStoreError: see ``content``.
            CheckpointError: see ``checkpoints.unpack``.
        """
        family, loaded = checkpoints.unpack(self.content(name))
        if family != card_of(name).family:
            raise ModelStoreError(f"{name} in {self.url} holds a network of the family {family!r}")
        return loaded

    def add(self, name: str, url: str) -> tuple[Record, bytes | None]:
        """Read a public file, check it, convert it, try it, and keep it; a model of that name is replaced.

        Args:
            url: path or fsspec URL of the file, as its owner publishes it.

        Returns:
            the record, and a sample sheet (PNG) of generators.

        Raises:
            ModelStoreError: unknown name; a file that cannot be read; a digest that is not the published one; a network
                of another size than the name says; numbers that are not finite.
            CheckpointError: the file is not that checkpoint, or broken, or malicious.
        """
        card = _known(name)
        try:
            content = _files(url).read(max_bytes=checkpoints.MAX_BYTES)
        except Exception as error:
            raise ModelStoreError(f"cannot read {url}: {error}") from error
        digest = hashlib.sha256(content).hexdigest()
        file = url.rstrip("/").rsplit("/", 1)[-1]
        if card.sha256 is not None and not digest.startswith(card.sha256):
            raise ModelStoreError(
                f"{file} has sha256 {digest}, the published file's begins with {card.sha256}: refused"
            )
        found = checkpoints.read_checkpoint(content)
        size = len(content)
        del content
        loaded = checkpoints.load_public(card.family, found.value)
        for fact, want in card.facts.items():
            # A recogniser's file may come without the head that counts its people.
            if loaded.facts.get(fact) not in (want, None):
                raise ModelStoreError(f"{file} has {fact} {loaded.facts.get(fact)}, {name} is {want}: another name?")
        bad = [k for k, v in loaded.network.state_dict().items() if v.is_floating_point() and not v.isfinite().all()]
        if bad:
            raise ModelStoreError(f"{file} has numbers that are not finite, in {', '.join(bad[:3])}")
        mapping = loaded.network.mapping if card.family == "stylegan2" else None
        if card.family == "e4e":
            mapping = checkpoints.decoder_of(found.value)
        probe = None if mapping is None else w_space.probe(mapping)
        check, sheet = self_check(loaded, probe)
        packed = checkpoints.pack(card.family, loaded)
        record = Record(
            name=name,
            family=card.family,
            facts=loaded.facts,
            sha256=hashlib.sha256(packed).hexdigest(),
            source=file,
            source_sha256=digest,
            source_bytes=size,
            layout=found.form,
            skipped=found.skipped,
            digest="unknown" if card.sha256 is None else "published",
            notes=loaded.notes,
            parameters=sum(p.numel() for p in loaded.network.parameters()),
            codes=getattr(loaded.network, "num_codes", None),
            w_probe=None if probe is None else kept_probe(probe).tolist(),
            w_fingerprint=None if probe is None else w_fingerprint(probe),
            check=check,
            added=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        # The record last: a model counts as there only when its network is.
        self._write(f"{name}.safetensors", packed)
        if sheet is not None:
            self._write(f"{name}.png", sheet)
        self._write(f"{name}.json", json.dumps(asdict(record), indent=1).encode())
        return record, sheet

    def verify(self, name: str) -> dict[str, Any]:
        """Digest, entries and the self-check once more; what it saw.

        Raises:
            MissingModelError, ModelStoreError, CheckpointError: see ``load``; also where the self-check sees another
            result than when the model was added.
        """
        record, loaded = self.record(name), self.load(name)
        seen, _ = self_check(loaded, None)
        for key, value in seen.items():
            before = record.check.get(key)
            if (
                isinstance(value, float)
                and isinstance(before, float)
                and abs(value - before) > 0.01 * max(1, abs(before))
            ):
                raise ModelStoreError(f"{name}: the self-check sees {key} {value:.4g}, when it was added {before:.4g}")
        return seen

    def remove(self, name: str) -> None:
        """Take a model out of the store: the record first, so that nobody finds half of one.

        Raises:
            MissingModelError, ModelStoreError: see ``record``; the back end refuses.
        """
        _known(name)
        if not self.has(name):
            raise MissingModelError(name, self.url)
        for file in (f"{name}.json", f"{name}.safetensors", f"{name}.png"):
            try:
                self._files.remove(file)
            except Exception as error:
                raise ModelStoreError(f"cannot remove {file} from {self.url}: {error}") from error


def _files(url: str) -> Files:
    try:
        return Files(url)
    except BadUrlError as error:
        raise ModelStoreError(str(error)) from error


def _known(name: str) -> PublicModel:
    try:
        return card_of(name)
    except KeyError as error:
        raise ModelStoreError(str(error.args[0])) from None


# ---- W spaces --------------------------------------------------------------------------------------------------------


def kept_probe(probe: torch.Tensor) -> torch.Tensor:
    """The part of a probe that records keep and that is compared."""
    return probe[:, :_PROBE_WIDTH]


def embedded_probe() -> torch.Tensor:
    """Of the embedded generator's mapping network."""
    return w_space.probe(load_mobilestylegan(256, head=None).mapping)


def w_fingerprint(probe: torch.Tensor) -> str:
    """16 hex digits that name a W space: the embedded one's where it is that, else of the numbers themselves."""
    if w_space.agree(kept_probe(embedded_probe()), kept_probe(probe)):
        return embedded_w_digest()
    return hashlib.sha256(np.ascontiguousarray(probe.numpy()).tobytes()).hexdigest()[:16]


# ---- self-check ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def self_check(loaded: Loaded, probe: torch.Tensor | None) -> tuple[dict[str, Any], bytes | None]:
    """Run a network once, on generated faces: numbers for its card, and a sheet of samples of generators.

    Raises:
        ModelStoreError: an output is not finite.
    """
    network = loaded.network
    if hasattr(network, "mapping"):
        z = torch.from_numpy(np.random.default_rng(1).standard_normal((4, 512), dtype=np.float32))
        w = network.truncate(network.mapping(z), 0.7)
        pictures = torch.cat([network(one[None, None].expand(1, network.num_codes, -1)) for one in w])
        _finite(pictures, "pictures")
        seen = {"pictures_mean": float(pictures.mean()), "pictures_std": float(pictures.std())}
        return seen, _sheet(pictures)
    faces = _faces(4)
    if isinstance(network, Recogniser):
        landmarks, boxes = ffhq_mean_geometry(len(faces), faces.shape[-1])
        own = network.embed_crops(faces, landmarks, boxes)
        blurred = torch.nn.functional.avg_pool2d(faces, 3, 1, 1)
        same = (own * network.embed_crops(blurred, landmarks, boxes)).sum(1)
        other = (own @ own.T)[~torch.eye(len(own), dtype=torch.bool)]
        _finite(own, "embeddings")
        return {"cosine_same_blurred": float(same.mean()), "cosine_others": float(other.mean())}, None
    if hasattr(network, "per_layer"):
        near = torch.nn.functional.avg_pool2d(faces, 3, 1, 1)
        distances = network(faces, near), network(faces, faces.flip(0)), network(faces, faces)
        _finite(torch.stack(distances), "distances")
        names = ("distance_blurred", "distance_others", "distance_self")
        return {n: float(d.mean()) for n, d in zip(names, distances, strict=True)}, None
    codes = network(faces[:1])
    _finite(codes, "codes")
    return {"codes_mean": float(codes.mean()), "codes_std": float(codes.std())}, None


def _finite(values: torch.Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise ModelStoreError(f"the network's {what} are not finite: the file is damaged, or not what its name says")


def _faces(count: int) -> torch.Tensor:
    """Generated people, (count, 3, 256, 256) in [-1, 1]; always the same."""
    generator = load_mobilestylegan(256)
    z = torch.from_numpy(np.random.default_rng(2).standard_normal((count, 512), dtype=np.float32))
    w = generator.truncate(generator.mapping(z), 0.7)
    return torch.cat([generator(one[None, None].expand(1, generator.num_codes, -1)) for one in w]).clamp(-1, 1)


def _sheet(pictures: torch.Tensor) -> bytes:
    if pictures.shape[-1] > 256:
        pictures = torch.nn.functional.interpolate(pictures, (256, 256), mode="area")
    row = np.concatenate([to_uint8(p) for p in pictures.clamp(-1, 1)], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(row).save(buffer, "PNG")
    return buffer.getvalue()


__all__ = ["CheckpointError", "MissingModelError", "ModelStore", "ModelStoreError", "Record", "default_url"]
