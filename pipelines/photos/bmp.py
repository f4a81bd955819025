"""BMP: read and write."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import BmpImagePlugin, Image

from pipelines.photos.photo import Limits, Photo, PhotoError
from pipelines.photos.shared import check_size, dpi_of, luma_of, planes_of


def _bmp_rows(data: bytes) -> tuple[int, int, int, int, bool] | None:
    """(offset, width, height, bytes a pixel, bottom-up) of plain B, G, R(, A) rows; None for all other kinds."""
    offset, head = struct.unpack_from("<II", data, 10)
    if head < 40:
        return None
    width, height, _, bits, packing = struct.unpack_from("<iiHHI", data, 18)
    masks = struct.unpack_from("<III", data, 54) if len(data) >= 66 else ()
    plain = packing == 0 or (packing == 3 and bits == 32 and masks == (0xFF0000, 0xFF00, 0xFF))
    if bits not in (24, 32) or not plain or width < 1 or height == 0 or offset < 14 + head:
        return None
    if offset + (width * bits // 8 + 3 & ~3) * abs(height) > len(data):
        raise PhotoError("TRUNCATED", "the BMP has fewer rows than its header says")
    return offset, width, abs(height), bits // 8, height > 0


def read_bmp(data: bytes, limits: Limits) -> Photo:
    head = struct.unpack_from("<I", data, 14)[0]
    width, height = struct.unpack_from("<HH" if head == 12 else "<ii", data, 18)
    check_size(width, abs(height), limits)
    im = BmpImagePlugin.BmpImageFile(io.BytesIO(data))
    if im.mode == "1":
        raise PhotoError("UNSUPPORTED_MODE", "black-and-white (1 bit a pixel)")
    if im.mode not in ("L", "RGB", "RGBA", "P"):
        raise PhotoError("UNSUPPORTED_MODE", f"BMP of mode {im.mode}")
    im.load()
    _bmp_rows(data)
    pixels, _ = planes_of(im, 1)
    notes = ["palette: written as true colour"] if im.mode == "P" else []
    return Photo(pixels, "BMP", im.mode, data, dpi=dpi_of(im.info), notes=tuple(notes))


def write_bmp(photo: Photo, pixels: np.ndarray) -> bytes:
    plain = _bmp_rows(photo.source)
    if plain is None:
        out = io.BytesIO()
        im = luma_of(pixels) if photo.grey else Image.fromarray(pixels)
        im.save(out, "BMP", **({"dpi": photo.dpi} if photo.dpi else {}))
        return out.getvalue()
    offset, width, height, step, bottom_up = plain
    stride = width * step + 3 & ~3
    out = bytearray(photo.source)
    rows = np.frombuffer(out, np.uint8, stride * height, offset).reshape(height, stride)
    target = rows[:, : width * step].reshape(height, width, step)
    target[..., :3] = (pixels[::-1] if bottom_up else pixels)[..., ::-1]
    return bytes(out)
