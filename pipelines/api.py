"""Protect single pictures from Python: no folder of a run, no Ray. The stages are those of ``scol protect``.

    from pipelines.api import Protector

    with Protector(profile="quick") as protector:
        protected = protector.protect(image)          # a PIL image or an array
    protected.image, protected.status, protected.faces[0].measures["ism"]
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

from cluster import LocalChain
from pipelines.archive.entry import SourceRow
from pipelines.archive.listing import source_table
from pipelines.archive.paths import safe_relative
from pipelines.config.load import load_config
from pipelines.config.sections import Config
from pipelines.jobs.chain import setting_of
from pipelines.jobs.run_gallery import RunGallery
from pipelines.networks.resolve import resolve
from pipelines.run.folder import Run
from pipelines.run.keys import stage_rules
from pipelines.run.schemas import ERROR, NO_FACE, OK, SOURCE, WEAK, payload
from pipelines.stages.chain import make_stages

Picture = Image.Image | NDArray[np.uint8]
_MODES = ("RGB", "RGBA", "L", "LA", "P")
_WORST = (ERROR, WEAK, OK, NO_FACE)
_NOT_MEASURES = ("path", "action", "out_path", "out_bytes", "sha256", "notes", "distorted")


class PictureError(ValueError):
    """A picture that cannot be taken: its type, shape, mode or name."""


@dataclass(frozen=True, eq=False)
class Face:
    """What became of one face.

    Attributes:
        box: float32 (4,), x0, y0, x1, y1 in pixels of the picture.
        landmarks: float32 (5, 2), x, y in pixels: left eye (in the picture), right eye, nose, corners of the mouth.
        status: ``ok``; ``weak``: the judge may still know it; ``error``.
        reason: ``CODE: words`` where the status is not ``ok``.
        measures: columns of ``publish`` (docs/manifests.md) by name: ``psnr``, ``ssim``, ``flip``, ``judge``, ``ism``,
            ``max_ism``, ...; empty where the picture failed.
        distorted: the judge's cosine after each of ``publish.distortions``, by name.
    """

    box: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    status: str
    reason: str | None
    measures: Mapping[str, Any] = field(default_factory=dict)
    distorted: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Protected:
    """What became of one picture.

    Attributes:
        image: the protected picture, of the type, size and channels that came in (a palette becomes RGB); equal to what
            came in where no face was found; None where the status is ``error``, so that a face cannot go out
            unprotected by mistake.
        status: the worst of the faces'; ``no_face`` where there is none.
        reason: ``CODE: words`` where the status is not ``ok``.
        faces: largest first.
    """

    image: Picture | None
    status: str
    reason: str | None
    faces: tuple[Face, ...]


class Protector:
    """Loads networks and gallery once, and protects pictures one by one.

    It works in this process, on one picture at a time, in temporary files that nobody else can read and that are gone
    when it is closed. The same pictures give the same results as PNG files of the same names in ``scol protect`` with
    the same settings, bit for bit where ``engine.threads`` is set to the same number (sums of floats depend on how they
    are split).

    Args:
        profile: see ``scol config``.
        config: instead of a profile; of ``load_config``.
        sets: ``section.key=value``, on top of the profile.
        say: takes messages for people, one line each.

    Raises:
        ConfigError: an unknown profile or setting.
        WeightsError, ModelStoreError, GalleryError: networks or gallery are missing, altered, or do not fit.
    """

    def __init__(
        self,
        profile: str = "standard",
        *,
        config: Config | None = None,
        sets: Sequence[str] = (),
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        config = load_config(profile, sets=sets) if config is None else config
        self.config = resolve(config, say)
        self._folder = tempfile.TemporaryDirectory(prefix="scol-")
        try:
            self._photos, self._out = (Path(self._folder.name) / name for name in ("photos", "out"))
            gallery = RunGallery.open(self.config, Run(str(Path(self._folder.name) / "run")), say)
            setting = setting_of(self.config, gallery, str(self._out), 1)
            self._rules = stage_rules(self.config, setting.weights, str(self._out))
            self._chain = LocalChain(make_stages(setting), SOURCE)
        except BaseException:
            self._folder.cleanup()
            raise

    def close(self) -> None:
        """Remove the temporary files."""
        self._folder.cleanup()

    def __enter__(self) -> Protector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def protect(self, image: Picture, name: str | None = None) -> Protected:
        """Protect one picture.

        Args:
            image: upright (``PIL.ImageOps.exif_transpose`` makes it so): a PIL image (RGB, RGBA, L, LA, P), or uint8
                (H, W), (H, W, 3) RGB or (H, W, 4) RGBA.
            name: relative path that the random numbers come from, as of a photo in an archive; by default the picture's
                digest, so that equal pictures give equal results.

        Raises:
            PictureError: it is no such picture, or the name is no relative path.
            OSError: no room for temporary files.
            WorkerUnfit: the GPU has failed; this process can no longer work.
        """
        data = _as_png(image)
        try:
            path = safe_relative(name) if name is not None else hashlib.sha256(data).hexdigest()[:32]
        except ValueError as error:
            raise PictureError(f"name: {error}") from error
        place = self._photos / "photo.png"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(data)
        before = torch.get_num_threads()
        torch.set_num_threads(self.config.engine.threads or before)
        try:
            tables = self._chain.run(source_table([SourceRow(path, str(place), len(data), None)]), self._rules)
            return self._answer(image, tables)
        finally:
            torch.set_num_threads(before)
            place.unlink()
            for written in self._out.rglob("*"):
                if written.is_file():
                    written.unlink()

    def protect_many(self, images: Iterable[Picture], names: Iterable[str] | None = None) -> list[Protected]:
        """Protect pictures in their order; each as ``protect`` does, with the same result. One that fails costs no
        other.

        Raises:
            ValueError: another number of names than of pictures. PictureError, OSError, WorkerUnfit: as ``protect``.
        """
        images = list(images)
        return [self.protect(*both) for both in zip(images, names or [None] * len(images), strict=True)]

    def _answer(self, image: Picture, tables: Mapping[str, pa.Table]) -> Protected:
        rows = tables["publish"].to_pylist()
        where = {row["face_id"]: row for row in tables["align"].select(["face_id", "box", "landmarks"]).to_pylist()}
        worst = min(rows, key=lambda row: _WORST.index(row["status"]))
        faces = tuple(_face(row, where[row["face_id"]]) for row in rows if row["face_id"] is not None)
        picture = None
        if worst["status"] != ERROR:
            picture = _as_came(Path(worst["out_path"]).read_bytes(), image)
        return Protected(picture, worst["status"], worst["reason"], faces)


def _face(row: Mapping[str, Any], place: Mapping[str, Any]) -> Face:
    measures = {name: row[name] for name in payload("publish") if name not in _NOT_MEASURES}
    return Face(
        np.array(place["box"], np.float32),
        np.array(place["landmarks"], np.float32).reshape(5, 2),
        row["status"],
        row["reason"],
        {name: value for name, value in measures.items() if value is not None},
        {entry["name"]: entry["ism"] for entry in row["distorted"] or ()},
    )


def _as_png(image: Picture) -> bytes:
    """The picture as a PNG. Raises PictureError."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise PictureError(f"uint8 (H, W), (H, W, 3) or (H, W, 4) expected, got {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise PictureError(f"a PIL image or a numpy array expected, got {type(image).__name__}")
    if image.mode not in _MODES:
        raise PictureError(f"mode {image.mode!r}; there are {', '.join(_MODES)}")
    if not image.width or not image.height:
        raise PictureError("a picture without pixels")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _as_came(data: bytes, image: Picture) -> Picture:
    """A PNG as an image or array, whichever came in."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        picture.load()
        return np.array(picture) if isinstance(image, np.ndarray) else picture.copy()
