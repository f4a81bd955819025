"""A decoded photo, the limits of what is decoded, and the error of one that is refused."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

MAX_PIXELS = 100_000_000
MAX_BYTES = 512 * 1024 * 1024
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")


class PhotoError(ValueError):
    """A photo that is refused. `code` is one of `CODES`; `str()` is `CODE: words`."""

    CODES = (
        "EMPTY",
        "NOT_AN_IMAGE",
        "TRUNCATED",
        "CORRUPT",
        "UNSUPPORTED_FORMAT",
        "UNSUPPORTED_MODE",
        "ANIMATED",
        "TOO_LARGE",
        "ENCODE_FAILED",
    )

    def __init__(self, code: str, message: str):
        assert code in self.CODES
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message

    def __reduce__(self):
        return type(self), (self.code, self.message)


@dataclass(frozen=True)
class Limits:
    """What is refused before anything is decoded. `max_pixels`: width times height; `max_bytes`: size of the file."""

    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_BYTES


@dataclass(frozen=True)
class JpegParams:
    """`qtables`: one table of 64 steps (natural order) for each component, equal ones merged at the end.
    `subsampling`: Pillow's 0 = 4:4:4, 1 = 4:2:2, 2 = 4:2:0, or -1 (others: written as 4:4:4). `rgb`: stored as RGB."""

    qtables: tuple[tuple[int, ...], ...]
    subsampling: int
    progressive: bool
    rgb: bool


@dataclass(frozen=True, eq=False)
class Photo:
    """A decoded photo and all that `encode` needs.

    `pixels`: uint8 (H, W, 3) RGB, upright, read-only. `alpha`: uint8 (H, W) upright, or None. `format`: one of FORMATS.
    `mode`: how the file stores it (`RGB`, `L`, `P`, ...). `orientation`: the source's, 1 to 8, already applied.
    `exif` (TIFF block without `Exif\\0\\0`), `xmp`, `icc`: bytes or None, exif and xmp already corrected for upright
    pixels. `dpi`: pixels an inch (x, y) or None. `jpeg`: JPEG only. `lossless`, `quality`: WebP (quality 0 to 100 as
    libwebp counts, estimated from the quantiser). `compression`: TIFF, Pillow's name. `chunks`: kept JPEG segments or
    PNG chunks as (marker or name, payload). `notes`: what was removed or changed, in words. `source`: the file.
    """

    pixels: np.ndarray
    format: str
    mode: str
    source: bytes = field(repr=False)
    orientation: int = 1
    alpha: np.ndarray | None = None
    exif: bytes | None = field(default=None, repr=False)
    xmp: bytes | None = field(default=None, repr=False)
    icc: bytes | None = field(default=None, repr=False)
    dpi: tuple[float, float] | None = None
    jpeg: JpegParams | None = None
    lossless: bool = True
    quality: float | None = None
    compression: str | None = None
    chunks: tuple[tuple[bytes, bytes], ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def grey(self) -> bool:
        """Stored without colour, and written so."""
        return self.mode in ("L", "LA")
