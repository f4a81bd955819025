"""PNG: read and write."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import PngImagePlugin

from pipelines.photos.photo import Limits, Photo, PhotoError
from pipelines.photos.shared import (
    check_size,
    clean_metadata,
    dpi_of,
    orientation_of,
    planes_of,
    strip_exif_header,
    with_alpha,
)

# Copied where the colour type stays; the first group also where it changes.
_PNG_KEEP = {b"cHRM", b"gAMA", b"iCCP", b"sRGB", b"cICP", b"mDCV", b"cLLI", b"pHYs", b"tIME", b"tEXt", b"zTXt", b"iTXt"}
_PNG_KEEP_IF_SAME = {b"sBIT", b"bKGD"}
_PNG_DROP = {b"PLTE", b"tRNS", b"hIST", b"sPLT", b"eXIf"}


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    out, pos = [], 8
    while True:
        if pos + 12 > len(data):
            raise PhotoError("TRUNCATED", "the PNG ends without its IEND chunk")
        n, name = int.from_bytes(data[pos : pos + 4], "big"), data[pos + 4 : pos + 8]
        if not name.isalpha():
            raise PhotoError("CORRUPT", f"no PNG chunk at byte {pos}")
        if pos + 12 + n > len(data):
            raise PhotoError("TRUNCATED", f"the PNG ends inside its {name.decode()} chunk")
        payload = data[pos + 8 : pos + 8 + n]
        if zlib.crc32(payload, zlib.crc32(name)) != int.from_bytes(data[pos + 8 + n : pos + 12 + n], "big"):
            raise PhotoError("CORRUPT", f"wrong checksum in the PNG's {name.decode()} chunk")
        out.append((name, payload))
        pos += 12 + n
        if name == b"IEND":
            return out


def _raw_profile(text: str | bytes) -> bytes | None:
    """ImageMagick's hexadecimal `Raw profile type`: newline, name, length, hex digits."""
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    parts = text.split("\n", 3)
    try:
        return bytes.fromhex(parts[3]) if len(parts) == 4 else None
    except ValueError:
        return None


def read_png(data: bytes, limits: Limits) -> Photo:
    # IHDR first, so that the limit is checked before the file is walked.
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise PhotoError("TRUNCATED" if len(data) < 33 else "CORRUPT", "the PNG has no header")
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    check_size(width, height, limits)
    chunks = _png_chunks(data)
    if any(name == b"acTL" for name, _ in chunks):
        raise PhotoError("ANIMATED", "an animated PNG")
    if depth == 16:
        raise PhotoError("UNSUPPORTED_MODE", "16 bits a channel: convert it to 8 bits first")
    if depth == 1 and colour == 0:
        raise PhotoError("UNSUPPORTED_MODE", "black-and-white (1 bit a pixel)")

    im = PngImagePlugin.PngImageFile(io.BytesIO(data))
    im.load()
    if colour == 0 and depth < 8 and isinstance(im.info.get("transparency"), int):
        im.info["transparency"] *= 255 // ((1 << depth) - 1)
    notes: list[str] = []
    exif = next((p for name, p in chunks if name == b"eXIf"), None)
    xmp = None
    kept = []
    for name, payload in chunks:
        keyword = payload.split(b"\0", 1)[0] if name in (b"tEXt", b"zTXt", b"iTXt") else b""
        if keyword == b"XML:com.adobe.xmp":
            value = im.info.get("xmp") or im.info.get(keyword.decode())
            xmp = value.encode() if isinstance(value, str) else value
        elif keyword in (b"Raw profile type exif", b"Raw profile type APP1"):
            exif = exif or _raw_profile(im.info.get(keyword.decode(), ""))
            notes.append("moved EXIF from a text chunk to the eXIf chunk")
        elif keyword.startswith(b"Raw profile type "):
            notes.append(f"removed {keyword.decode('latin-1')}")
        elif name in _PNG_KEEP or name in _PNG_KEEP_IF_SAME:
            kept.append((name, payload))
        elif name[0:1].islower() and name not in _PNG_DROP:
            # The fourth letter in lower case: safe to copy when the pixels change (PNG specification, 5.4).
            if name[3:4].islower():
                kept.append((name, payload))
            else:
                notes.append(f"removed PNG chunk {name.decode()}")
    exif = strip_exif_header(exif)
    orientation = orientation_of(exif, xmp)
    exif, xmp = clean_metadata(exif, xmp, (width, height), orientation, notes)
    pixels, alpha = planes_of(im, orientation)
    mode = im.mode
    if mode == "P":
        notes.append("palette: written as true colour")
    elif mode not in ("L", "LA", "RGB", "RGBA"):
        raise PhotoError("UNSUPPORTED_MODE", f"PNG of mode {mode}")
    if mode == "P" or (alpha is not None and mode in ("L", "RGB")):
        kept = [c for c in kept if c[0] not in _PNG_KEEP_IF_SAME]
    if orientation >= 5:
        kept = [(n, p[4:8] + p[0:4] + p[8:]) if n == b"pHYs" and len(p) == 9 else (n, p) for n, p in kept]
    if exif:
        kept.append((b"eXIf", exif))
    if xmp:
        kept.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    return Photo(
        pixels,
        "PNG",
        mode,
        data,
        orientation,
        alpha,
        exif,
        xmp,
        im.info.get("icc_profile"),
        dpi_of(im.info),
        chunks=tuple(kept),
        notes=tuple(notes),
    )


def write_png(photo: Photo, pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with_alpha(photo, pixels).save(buffer, "PNG")
    chunks = _png_chunks(buffer.getvalue())
    out = bytearray(b"\x89PNG\r\n\x1a\n")
    for name, payload in (chunks[0], *photo.chunks, *(c for c in chunks[1:] if c[0] in (b"IDAT", b"IEND"))):
        out += (
            len(payload).to_bytes(4, "big") + name + payload + zlib.crc32(payload, zlib.crc32(name)).to_bytes(4, "big")
        )
    return bytes(out)
