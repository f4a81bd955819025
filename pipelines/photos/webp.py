"""WebP: read and write."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import WebPImagePlugin

from pipelines.photos.photo import Limits, Photo, PhotoError
from pipelines.photos.shared import check_size, clean_metadata, orientation_of, planes_of, strip_exif_header, with_alpha


class _Bool:
    """The boolean entropy decoder of VP8 (RFC 6386, section 7), here only for header fields of probability 1/2."""

    def __init__(self, data: bytes):
        self.data, self.pos = data, 2
        self.value, self.range, self.bits = int.from_bytes(data[:2], "big"), 255, 0

    def bit(self, prob: int = 128) -> int:
        split = 1 + (((self.range - 1) * prob) >> 8)
        high = split << 8
        if self.value >= high:
            found, self.range, self.value = 1, self.range - split, self.value - high
        else:
            found, self.range = 0, split
        while self.range < 128:
            self.value, self.range, self.bits = self.value << 1, self.range << 1, self.bits + 1
            if self.bits == 8:
                self.bits = 0
                self.value |= self.data[self.pos] if self.pos < len(self.data) else 0
                self.pos += 1
        return found

    def number(self, bits: int) -> int:
        value = 0
        for _ in range(bits):
            value = value << 1 | self.bit()
        return value

    def signed(self, bits: int) -> int:
        value = self.number(bits)
        return -value if self.bit() else value


def _vp8_quantisers(frame: bytes) -> list[int]:
    """The luma AC quantiser index (0 to 127) of each segment of a VP8 key frame (RFC 6386, sections 9.2 to 9.6)."""
    b = _Bool(frame[10:])
    b.number(2)
    absolute, segment = 0, [0, 0, 0, 0]
    segmented = b.bit()
    if segmented:
        update_map, update_data = b.bit(), b.bit()
        if update_data:
            absolute = b.bit()
            segment = [b.signed(7) if b.bit() else 0 for _ in range(4)]
            for _ in range(4):
                if b.bit():
                    b.signed(6)
        if update_map:
            for _ in range(3):
                if b.bit():
                    b.number(8)
    b.number(1 + 6 + 3)
    if b.bit() and b.bit():
        for _ in range(8):
            if b.bit():
                b.signed(6)
    b.number(2)
    base = b.number(7)
    return [s if absolute else base + s for s in segment] if segmented else [base]


def _webp_quality(quantisers: list[int]) -> float:
    """libwebp's quality (0 to 100) for these indices: the inverse of its compression curve (quant_enc.c).

    There, index = 127 (1 - c) for a block of average difficulty, c = linear^(1/3), linear = 2/3 q below q = 0.75 and
    2 q - 1 above.
    """
    c = 1 - min(max(sum(quantisers) / len(quantisers), 0), 127) / 127
    linear = c**3
    return 100 * (1.5 * linear if linear < 0.5 else (linear + 1) / 2)


def _webp_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise PhotoError("TRUNCATED", f"the WebP has {len(data)} of {end} bytes")
    out, pos = [], 12
    while pos + 8 <= end:
        n = int.from_bytes(data[pos + 4 : pos + 8], "little")
        if pos + 8 + n > len(data):
            raise PhotoError("TRUNCATED", "the WebP ends inside a chunk")
        out.append((data[pos : pos + 4], data[pos + 8 : pos + 8 + n]))
        pos += 8 + n + (n & 1)
    return out


def read_webp(data: bytes, limits: Limits) -> Photo:
    # Sizes are checked by hand: Pillow's reader allocates the canvas as soon as it is made.
    chunks = _webp_chunks(data)
    if not chunks:
        raise PhotoError("CORRUPT", "an empty WebP")
    by_name = dict(reversed(chunks))
    if b"VP8X" in by_name and len(by_name[b"VP8X"]) >= 10:
        head = by_name[b"VP8X"]
        check_size(int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1, limits)
        if head[0] & 2:
            raise PhotoError("ANIMATED", "an animated WebP")
    if b"VP8 " in by_name and len(by_name[b"VP8 "]) >= 10:
        width, height = struct.unpack_from("<HH", by_name[b"VP8 "], 6)
        check_size(width & 0x3FFF, height & 0x3FFF, limits)
        lossless, quality = False, _webp_quality(_vp8_quantisers(by_name[b"VP8 "]))
    elif b"VP8L" in by_name and len(by_name[b"VP8L"]) >= 5:
        bits = int.from_bytes(by_name[b"VP8L"][1:5], "little")
        check_size((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, limits)
        lossless, quality = True, None
    else:
        raise PhotoError("CORRUPT", "the WebP has no picture")
    im = WebPImagePlugin.WebPImageFile(io.BytesIO(data))
    exif, xmp = strip_exif_header(im.info.get("exif")), im.info.get("xmp")
    im.load()
    notes: list[str] = []
    orientation = orientation_of(exif, xmp)
    exif, xmp = clean_metadata(exif, xmp, im.size, orientation, notes)
    pixels, alpha = planes_of(im, orientation)
    return Photo(
        pixels,
        "WEBP",
        im.mode,
        data,
        orientation,
        alpha,
        exif,
        xmp,
        im.info.get("icc_profile"),
        lossless=lossless,
        quality=quality,
        notes=tuple(notes),
    )


def write_webp(photo: Photo, pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    how = {"lossless": True, "exact": True} if photo.lossless else {"quality": photo.quality, "alpha_quality": 100}
    with_alpha(photo, pixels).save(
        out, "WEBP", exif=photo.exif or b"", xmp=photo.xmp or b"", icc_profile=photo.icc or b"", **how
    )
    return out.getvalue()
