"""Photos: bytes to upright pixels, and back to the same format with other pixels. No file system.

What `encode(decode(data), changed_pixels)` keeps, by format:

- JPEG: the same quantisation tables, subsampling and progressive flag; JFIF density, EXIF, XMP, ICC, IPTC and other
  Photoshop resources, comment. Samples of untouched pixels are taken from the file before any colour conversion, so
  that most untouched blocks come out identical.
- PNG: bit-equal outside the changed pixels; alpha, all text, colour and density chunks, EXIF, XMP. A palette becomes
  true colour (a protected face needs new colours), Adam7 interlacing becomes none.
- WebP: lossless bit-equal; lossy at the quality that gives the source's quantiser. Alpha, EXIF, XMP, ICC.
- TIFF: bit-equal; the same compression (none, LZW, Deflate, PackBits) and predictor; alpha, all descriptive tags, EXIF,
  GPS, XMP, ICC. Tiles become strips, a palette true colour.
- BMP: bit-equal; of 24 and 32 bits, all else byte for byte; other depths become 24 bits.

Greyscale photos are written as greyscale. Orientation: EXIF's tag, or XMP's where EXIF has none (Pillow's rule), is
applied once to the pixels and set to 1 everywhere. Embedded pictures (thumbnails, previews, further pictures of a
multi-picture JPEG, data behind the end) show the unprotected face and are removed: `Photo.notes` says what. Content
credentials (JUMBF) are removed as well, since their signature covers the old pixels.

Refused, with a typed reason: animations and several pages, CMYK and YCCK (no faithful way back without the printer's
profile), more than 8 bits a channel, black-and-white, premultiplied alpha, lossy TIFF, camera raw, GIF (256 colours
cannot carry a protected face), HEIC, AVIF and all other formats. A wrongly named file is read by its content.
"""

from __future__ import annotations

import struct

import numpy as np
from PIL import Image

from pipelines.photos.bmp import read_bmp, write_bmp
from pipelines.photos.jpeg import read_jpeg, write_jpeg
from pipelines.photos.metadata import MetadataError
from pipelines.photos.photo import Limits, Photo, PhotoError
from pipelines.photos.png import read_png, write_png
from pipelines.photos.tiff import read_tiff, write_tiff
from pipelines.photos.webp import read_webp, write_webp


def sniff(data: bytes) -> str:
    """The format by content, one of FORMATS. Raises PhotoError EMPTY, NOT_AN_IMAGE or UNSUPPORTED_FORMAT."""
    if not data:
        raise PhotoError("EMPTY", "the file has no bytes")
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:4] in (b"II*\0", b"MM\0*"):
        if data[8:10] == b"CR":
            raise PhotoError("UNSUPPORTED_FORMAT", "Canon raw: develop it to JPEG, PNG or TIFF first")
        return "TIFF"
    if (
        data[:2] == b"BM"
        and len(data) >= 26
        and struct.unpack_from("<I", data, 14)[0] in (12, 40, 52, 56, 64, 108, 124)
    ):
        return "BMP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        raise PhotoError("UNSUPPORTED_FORMAT", "GIF: its 256 colours cannot carry a protected face; convert it to PNG")
    if data[4:8] == b"ftyp":
        brand = data[8:12].decode("latin-1").strip()
        name = {"avif": "AVIF", "avis": "AVIF"}.get(brand)
        if name is None and brand in ("heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1"):
            name = "HEIC"
        what = (
            f"{name}: there is no faithful writer for it here; convert it to JPEG" if name else f"{brand!r} container"
        )
        raise PhotoError("UNSUPPORTED_FORMAT", what)
    known = {
        b"II+\0": "BigTIFF",
        b"MM\0+": "BigTIFF",
        b"8BPS": "Photoshop",
        b"\xff\x0a": "JPEG XL",
        b"\0\0\0\x0cJXL ": "JPEG XL",
        b"\0\0\0\x0cjP  ": "JPEG 2000",
        b"\xff\x4f\xff\x51": "JPEG 2000",
        b"\0\0\1\0": "icon",
        b"qoif": "QOI",
        b"IIRO": "Olympus raw",
        b"FUJIFILMCCD-RAW": "Fujifilm raw",
        b"IIU\0": "Panasonic raw",
        b"P5": "Netpbm",
        b"P6": "Netpbm",
        b"#?RADIANCE": "Radiance HDR",
    }
    for magic, name in known.items():
        if data.startswith(magic):
            raise PhotoError("UNSUPPORTED_FORMAT", f"{name}: only JPEG, PNG, WebP, TIFF and BMP are written back")
    raise PhotoError("NOT_AN_IMAGE", "the content is no picture format that is known here")


def decode(data: bytes, limits: Limits | None = None) -> Photo:
    """Reads a photo. See the module's text for what is kept and what is refused.

    `data`: the whole file. The pixel limit is checked on the header, before any pixel is decoded.
    Raises PhotoError; nothing else leaves this function, whatever the bytes are (memory errors of the machine aside).
    """
    limits = limits or Limits()
    if len(data) > limits.max_bytes:
        raise PhotoError("TOO_LARGE", f"{len(data):,} bytes; the limit is {limits.max_bytes:,}")
    data = bytes(data)
    readers = {"JPEG": read_jpeg, "PNG": read_png, "WEBP": read_webp, "TIFF": read_tiff, "BMP": read_bmp}
    reader = readers[sniff(data)]
    try:
        return reader(data, limits)
    except PhotoError:
        raise
    except Image.DecompressionBombError as e:
        raise PhotoError("TOO_LARGE", str(e)) from e
    except MemoryError as e:
        raise PhotoError("TOO_LARGE", "not enough memory to decode it") from e
    except EOFError as e:
        raise PhotoError("TRUNCATED", "the file ends too early") from e
    except Exception as e:  # Pillow's readers raise nearly anything on hostile bytes
        text = str(e) or type(e).__name__
        cut = any(word in text.lower() for word in ("truncated", "not enough image data", "premature"))
        raise PhotoError("TRUNCATED" if cut else "CORRUPT", text) from e


def encode(photo: Photo, pixels: np.ndarray) -> bytes:
    """The photo's file with these pixels instead: same format, see the module's text for what is kept.

    `pixels`: uint8 (H, W, 3) RGB upright, of the photo's size. Raises ValueError for another shape or type,
    PhotoError ENCODE_FAILED where the format's writer fails.
    """
    if pixels.dtype != np.uint8 or pixels.shape != photo.pixels.shape:
        raise ValueError(f"uint8 {photo.pixels.shape} expected, {pixels.dtype} {pixels.shape} given")
    writer = {"JPEG": write_jpeg, "PNG": write_png, "WEBP": write_webp, "TIFF": write_tiff, "BMP": write_bmp}
    try:
        return writer[photo.format](photo, np.ascontiguousarray(pixels))
    except (OSError, ValueError, MetadataError, struct.error) as e:
        raise PhotoError("ENCODE_FAILED", f"{photo.format}: {e}") from e
