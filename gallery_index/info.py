"""``index.json``: what a gallery is, and the digest of every file in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gallery_index.errors import GalleryCorruptError, GalleryMismatchError
from gallery_index.scoring import MODES
from gallery_index.storage import FileEntry

FORMAT, VERSION = "scol-gallery", 2
_READABLE = (1, VERSION)  # 1: without compression, and with an exact FAISS index of each layer


@dataclass(frozen=True)
class GalleryInfo:
    """The description of a finished gallery.

    Attributes:
        mode: ``raw``, ``cosine`` or ``centred``.
        count: N, the number of codes.
        layers: L, the layers a code has for the caller.
        dim: D, 512 for StyleGAN's W.
        broadcast: True where one W per id is stored and stands for all L layers.
        photos, people: how many different photo ids, and person ids other than null.
        embedding_dim: width of the identity embeddings, None where the gallery has none.
        weights: fingerprints of what made the codes, by role (``generator``, ``encoder``,
            ``recogniser``); None says that the role was not involved.
        source: words on where the codes come from.
        codes: the Parquet files, in the order of their rows.
        indexes: one FAISS file a stored layer, or none where the gallery is searched exactly alone.
        mean: file with the mean over the codes, .npy float64 (stored layers, D).
        norms: file with the codes' lengths in this mode, .npy float64 (stored layers, N).
        files: every file with its size and sha256.
        compression: how ``indexes`` were made, see ``compressed.Plan``; None where there are none.
        exact: files with a layer's codes as given, each a FAISS ``IndexFlatIP`` that can be mapped into memory, by
            which candidates of a compressed index are scored; one a stored layer, or none.
    """

    mode: str
    count: int
    layers: int
    dim: int
    broadcast: bool
    photos: int
    people: int
    embedding_dim: int | None
    weights: Mapping[str, str | None]
    source: str
    codes: tuple[str, ...]
    indexes: tuple[str, ...]
    mean: str
    norms: str
    files: Mapping[str, FileEntry]
    compression: Mapping[str, Any] | None = None
    exact: tuple[str, ...] = ()
    fingerprint: str = field(default="", compare=False)

    @property
    def stored_layers(self) -> int:
        return 1 if self.broadcast else self.layers

    def to_bytes(self) -> bytes:
        """The file's content: JSON, its ``fingerprint`` over all the rest."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "mode": self.mode,
            "count": self.count,
            "layers": self.layers,
            "dim": self.dim,
            "broadcast": self.broadcast,
            "photos": self.photos,
            "people": self.people,
            "embedding_dim": self.embedding_dim,
            "weights": dict(self.weights),
            "source": self.source,
            "codes": list(self.codes),
            "indexes": list(self.indexes),
            "mean": self.mean,
            "norms": self.norms,
            "compression": self.compression and dict(self.compression),
            "exact": list(self.exact),
            "files": {name: entry.as_json() for name, entry in sorted(self.files.items())},
        }
        return json.dumps(body | {"fingerprint": _digest(body)}, indent=1, ensure_ascii=False).encode()

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> GalleryInfo:
        """Parse and check.

        Raises:
            GalleryMismatchError: another format or a newer version.
            GalleryCorruptError: not JSON, altered (the fingerprint differs), or inconsistent.
        """
        try:
            body = json.loads(content)
            stated = body.pop("fingerprint", None)
            format_, version = body.pop("format", None), body.pop("version", None)
        except (ValueError, AttributeError, TypeError) as error:
            raise GalleryCorruptError(f"{where}: index.json is not readable: {error}") from error
        if format_ != FORMAT or version not in _READABLE:
            raise GalleryMismatchError(
                f"{where}: format {format_!r} version {version!r}, this program reads {FORMAT!r} version {VERSION}"
            )
        actual = _digest({"format": format_, "version": version} | body)
        if stated != actual:
            raise GalleryCorruptError(f"{where}: index.json was altered: fingerprint {stated}, content has {actual}")
        try:
            files = {n: FileEntry(n, int(f["bytes"]), str(f["sha256"])) for n, f in body.pop("files").items()}
            codes, indexes = tuple(body.pop("codes")), tuple(body.pop("indexes"))
            exact = tuple(body.pop("exact", ()))
            if version == 1:
                for name in indexes:  # of vectors that the codes give as well
                    del files[name]
                indexes = ()
            info = cls(**body, files=files, codes=codes, indexes=indexes, exact=exact, fingerprint=actual)
            named = {*info.codes, *info.indexes, *info.exact, info.mean, info.norms}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise GalleryCorruptError(f"{where}: index.json is inconsistent: {error!r}") from error
        layers = info.stored_layers if info.compression else 0
        if (
            info.mode not in MODES
            or named != set(files)
            or (len(info.indexes), len(info.exact)) != (layers, layers)
            or info.count < 1
        ):
            raise GalleryCorruptError(f"{where}: index.json is inconsistent")
        return info


@dataclass(frozen=True)
class Expectation:
    """What a caller needs a gallery to be; None leaves a point open.

    Attributes:
        mode: similarity.
        layers: L; a gallery of one W for all layers fits any.
        dim: D.
        weights: fingerprint by role.  A role that the gallery records as None (not involved: the
            encoder of a synthetic gallery) fits any; a role that it does not record fits none.
        fingerprint: of the gallery as a whole.
        mean: SHA-256 of the file with the mean.
    """

    mode: str | None = None
    layers: int | None = None
    dim: int | None = None
    weights: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str | None = None
    mean: str | None = None

    def check(self, info: GalleryInfo, where: str) -> None:
        """Raises GalleryMismatchError, naming both sides of every point that differs."""
        wrong = [
            f"{name} is {have!r}, {want!r} is needed"
            for name, have, want in (
                ("mode", info.mode, self.mode),
                # One W for all layers serves any number of them.
                ("number of layers", info.layers, None if info.broadcast else self.layers),
                ("code dimension", info.dim, self.dim),
                ("fingerprint", info.fingerprint, self.fingerprint),
                ("mean's sha256", info.files[info.mean].sha256, self.mean),
            )
            if want is not None and have != want
        ]
        for role, want in sorted(self.weights.items()):
            if role not in info.weights:
                wrong.append(f"the {role}'s fingerprint is not recorded, {want!r} is needed")
            elif info.weights[role] is not None and info.weights[role] != want:
                wrong.append(f"the {role}'s fingerprint is {info.weights[role]!r}, {want!r} is needed")
        if wrong:
            raise GalleryMismatchError(f"{where} (fingerprint {info.fingerprint}) does not fit: " + "; ".join(wrong))


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
