"""What the formats share: orientation, planes, resolution, and the cleaning of metadata."""

from __future__ import annotations

import math
import struct

import numpy as np
from PIL import Image

from pipelines.photos import metadata as photo_meta
from pipelines.photos.metadata import MetadataError
from pipelines.photos.photo import Limits, Photo, PhotoError

_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def check_size(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise PhotoError("CORRUPT", f"the header says {width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise PhotoError("TOO_LARGE", f"{width} x {height} pixels; the limit is {limits.max_pixels:,}")


def turned_upright(im: Image.Image, orientation: int) -> Image.Image:
    return im.transpose(_TURN[orientation]) if orientation in _TURN else im


def planes_of(im: Image.Image, orientation: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Upright RGB pixels and alpha of an image of mode L, LA, RGB, RGBA, P (with or without transparency)."""
    if im.mode == "P":
        im = im.convert("RGBA" if im.has_transparency_data else "RGB")
    elif im.mode in ("L", "RGB") and "transparency" in im.info:
        im = im.convert(im.mode + "A")
    im = turned_upright(im, orientation)
    alpha = np.asarray(im.getchannel("A")).copy() if im.mode in ("LA", "RGBA") else None
    pixels = np.asarray(im if im.mode == "RGB" else im.convert("RGB")).copy()
    pixels.flags.writeable = False
    return pixels, alpha


def orientation_of(exif: bytes | None, xmp: bytes | None) -> int:
    found = photo_meta.exif_orientation(exif) if exif else None
    if found is None and xmp:
        found = photo_meta.xmp_orientation(xmp)
    return found or 1


def clean_metadata(
    exif: bytes | None, xmp: bytes | None, stored: tuple[int, int], orientation: int, notes: list[str]
) -> tuple[bytes | None, bytes | None]:
    """EXIF and XMP corrected for upright pixels; adds to `notes`. `stored`: width and height in the file."""
    turned = orientation >= 5
    size = stored[::-1] if turned else stored
    if exif:
        try:
            exif, n = photo_meta.clean_exif(exif, size, turned)
            if n:
                notes.append(f"removed {n} embedded picture(s) from EXIF")
        except (MetadataError, struct.error):
            exif = None
            notes.append("removed unreadable EXIF")
    if xmp:
        xmp, n = photo_meta.clean_xmp(xmp, size, turned)
        if n:
            notes.append(f"removed {n} embedded picture(s) from XMP")
        if xmp is None:
            notes.append("removed XMP that is not UTF-8")
    return exif or None, xmp or None


def strip_exif_header(exif: bytes | None) -> bytes | None:
    while exif and exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    return exif or None


def luma_of(pixels: np.ndarray) -> Image.Image:
    """Rec. 601 luma as Pillow computes it; exact for neutral pixels."""
    return Image.fromarray(pixels).convert("L")


def dpi_of(info: dict) -> tuple[float, float] | None:
    dpi = info.get("dpi")
    try:
        dpi = (float(dpi[0]), float(dpi[1])) if dpi else None
    except (TypeError, ValueError, ZeroDivisionError, IndexError):
        return None
    return dpi if dpi and all(math.isfinite(x) and x > 0 for x in dpi) else None


EXIF_ID, XMP_ID, IRB_ID = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"Photoshop 3.0\0"


def with_alpha(photo: Photo, pixels: np.ndarray) -> Image.Image:
    """The image to be written: L, LA, RGB or RGBA."""
    if photo.grey:
        im = luma_of(pixels)
        return im if photo.alpha is None else Image.merge("LA", (im, Image.fromarray(photo.alpha)))
    return Image.fromarray(pixels if photo.alpha is None else np.dstack([pixels, photo.alpha]))
