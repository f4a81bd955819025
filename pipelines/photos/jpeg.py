"""JPEG: read and write."""

from __future__ import annotations

import io
import re
import struct
import threading

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin
from scipy import ndimage

from pipelines.photos import metadata as photo_meta
from pipelines.photos.photo import JpegParams, Limits, Photo, PhotoError
from pipelines.photos.shared import (
    EXIF_ID,
    IRB_ID,
    XMP_ID,
    check_size,
    clean_metadata,
    dpi_of,
    luma_of,
    orientation_of,
    planes_of,
    strip_exif_header,
    turned_upright,
)

_MARKER = re.compile(rb"\xff[^\x00\xff]")
_SOF = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}


def _jpeg_segments(data: bytes) -> tuple[list[tuple[int, bytes]], int]:
    """Marker segments before the first scan, as (marker, payload), and the offset of that scan's marker."""
    out, pos = [], 2
    while True:
        if pos + 4 > len(data):
            raise PhotoError("TRUNCATED", "the JPEG ends before its picture begins")
        marker = data[pos + 1]
        if data[pos] != 0xFF or marker in (0x00, 0xFF):
            # Padding between segments: skipped, as libjpeg does, at once, since there may be many MB of it.
            found = _MARKER.search(data, pos)
            pos = found.start() if found else len(data)
            continue
        if marker == 0xDA:
            return out, pos
        if marker == 0xD9:
            raise PhotoError("CORRUPT", "the JPEG has no picture")
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:
            pos += 2
            continue
        n = int.from_bytes(data[pos + 2 : pos + 4], "big")
        if n < 2:
            raise PhotoError("CORRUPT", f"a JPEG segment of length {n}")
        if pos + 2 + n > len(data):
            raise PhotoError("TRUNCATED", "the JPEG ends inside its header")
        out.append((marker, data[pos + 4 : pos + 2 + n]))
        pos += 2 + n


def read_jpeg(data: bytes, limits: Limits) -> Photo:
    segments, _ = _jpeg_segments(data)
    frame = next((payload for marker, payload in segments if marker in _SOF), None)
    if frame is None or len(frame) < 6:
        raise PhotoError("CORRUPT", "the JPEG has no frame header")
    precision, height, width, components = struct.unpack_from(">BHHB", frame)
    check_size(width, height, limits)
    if precision != 8:
        raise PhotoError("UNSUPPORTED_MODE", f"JPEG with {precision} bits a channel")
    if components == 4:
        raise PhotoError("UNSUPPORTED_MODE", "CMYK JPEG: convert it to RGB first (no faithful way back from RGB)")
    if components not in (1, 3):
        raise PhotoError("UNSUPPORTED_MODE", f"JPEG with {components} components")

    exif = xmp = icc = None
    notes: list[str] = []
    kept: list[tuple[bytes, bytes]] = []
    jfif, adobe = False, None
    for marker, payload in segments:
        name = bytes([marker])
        if marker == 0xE0 and payload.startswith(b"JFIF\0") and len(payload) >= 14 and not jfif:
            jfif = True
            if payload[12] and payload[13]:
                notes.append("removed the JFIF thumbnail")
            kept.append((name, payload[:12] + b"\0\0"))
        elif marker == 0xE1 and payload.startswith(EXIF_ID) and exif is None:
            exif = strip_exif_header(payload) or b""
            kept.append((b"EXIF", b""))
        elif marker == 0xE1 and payload.startswith(XMP_ID) and xmp is None:
            xmp = payload[len(XMP_ID) :]
            kept.append((b"XMP", b""))
        elif marker == 0xE2 and payload.startswith(b"ICC_PROFILE\0"):
            kept.append((name, payload))
        elif marker == 0xED and payload.startswith(IRB_ID):
            irb, n = photo_meta.clean_irb(payload[len(IRB_ID) :])
            if n:
                notes.append(f"removed {n} embedded picture(s) from Photoshop resources")
            if irb:
                kept.append((name, IRB_ID + irb))
        elif marker == 0xFE:
            kept.append((name, payload))
        elif marker == 0xEE and payload.startswith(b"Adobe") and len(payload) >= 12:
            adobe = payload[11]
        elif 0xE0 <= marker <= 0xEF:
            label = payload.split(b"\0")[0][:24].decode("latin-1")
            notes.append(f"removed JPEG segment APP{marker - 0xE0} {label if label.isprintable() else ''}".rstrip())

    im = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    icc, dpi = im.info.get("icc_profile"), dpi_of(im.info)
    # libjpeg's rule for the stored colour space (jdapimin.c, default_decompress_parms): JFIF, then Adobe, then ids.
    ids = bytes(frame[6 + 3 * i] for i in range(components)) if len(frame) >= 6 + 3 * components else b""
    rgb = components == 3 and not jfif and (adobe == 0 if adobe is not None else ids == b"RGB")
    tables = [tuple(im.quantization[layer[3]]) for layer in im.layer]
    while len(tables) > 1 and tables[-1] == tables[-2]:
        tables.pop()
    if len(tables) == 1 and len(im.quantization) > 1 and components == 3:
        tables *= 2
    params = JpegParams(
        tuple(tables),
        JpegImagePlugin.get_sampling(im) if components == 3 else -1,
        bool(im.info.get("progressive")),
        rgb,
    )
    if components == 3 and params.subsampling == -1:
        notes.append("chroma subsampling is none of 4:4:4, 4:2:2, 4:2:0: written as 4:4:4")

    orientation = orientation_of(exif, xmp)
    exif, xmp = clean_metadata(exif, xmp, (width, height), orientation, notes)
    chunks = []
    for name, payload in kept:
        if name == b"EXIF":
            name, payload = b"\xe1", EXIF_ID + exif if exif else b""
        elif name == b"XMP":
            name, payload = b"\xe1", XMP_ID + xmp if xmp else b""
        if payload:
            chunks.append((name, payload))
    im.load()
    pixels, _ = planes_of(im, orientation)
    return Photo(
        pixels,
        "JPEG",
        im.mode,
        data,
        orientation,
        exif=exif,
        xmp=xmp,
        icc=icc,
        dpi=dpi,
        jpeg=params,
        lossless=False,
        chunks=tuple(chunks),
        notes=tuple(notes),
    )


# libjpeg's "fancy upsampling" (jdsample.c) puts chroma at (3 near + far) / 4 in each direction. Least squares inverts
# it: with A that filter, A'A has the symbol (20 + 12 cos w) / 16, whose inverse decays like (-1/3)^|k|.
_INVERSE = (16 / (20 - 12 / 3) * (-1 / 3.0) ** np.abs(np.arange(-9, 10))).astype(np.float32)


def _downsample(plane: np.ndarray, axis: int) -> np.ndarray:
    """The chroma samples of which `plane` is the fancy upsampling by 2 along `axis`; float32, half the length."""
    u = np.moveaxis(plane.astype(np.float32, copy=False), axis, 0)
    even, odd = u[0::2], u[1::2]
    before, after = np.concatenate([even[:1], odd[:-1]]), np.concatenate([even[1:], odd[-1:]])
    c = ndimage.correlate1d(0.75 * (even + odd) + 0.25 * (before + after), _INVERSE, axis=0, mode="reflect")
    return np.moveaxis(c, 0, axis)


def _stored_samples(photo: Photo) -> np.ndarray:
    """uint8 (H, W, 3) YCbCr, upright: the JPEG's own samples, chroma repeated instead of interpolated.

    Handing these to the encoder, whose box filter takes the mean of 2 x 2, gives it the very chroma samples that were
    decoded. The usual way through interpolated RGB blurs chroma and clips colours at every save.
    """
    assert photo.jpeg is not None
    im = JpegImagePlugin.JpegImageFile(io.BytesIO(photo.source))
    im.draft("YCbCr", None)
    im.load()
    samples = np.asarray(im).copy()
    h, w = samples.shape[:2]
    axes = {1: (1,), 2: (1, 0)}.get(photo.jpeg.subsampling, ())
    # Narrower planes are not interpolated by libjpeg.
    if axes and w > 4:
        for channel in (1, 2):
            plane = np.pad(samples[..., channel], ((0, h % 2 if 0 in axes else 0), (0, w % 2)), mode="edge")
            for axis in axes:
                plane = _downsample(plane, axis)
            plane = np.clip(np.rint(plane), 0, 255).astype(np.uint8)
            for axis in axes:
                plane = plane.repeat(2, axis)
            samples[..., channel] = plane[:h, :w]
    return np.asarray(turned_upright(Image.fromarray(samples, "YCbCr"), photo.orientation))


# JFIF 1.02, "Conversion to and from RGB".
_TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]], dtype=np.float32
)


def _ycc(photo: Photo, pixels: np.ndarray) -> Image.Image:
    """The stored samples plus the change from the old pixels to the new ones, in YCbCr."""
    samples = _stored_samples(photo).copy()
    rows, cols = np.nonzero((pixels != photo.pixels).any(axis=2))
    if len(rows):
        old, new = photo.pixels[rows, cols], pixels[rows, cols]
        change = (new.astype(np.float32) - old) @ _TO_YCC.T
        moved = np.clip(np.rint(samples[rows, cols] + change), 0, 255)
        # Where the old colour was clipped, the samples lie outside RGB and adding would miss the new colour.
        clipped = ((old == 0) | (old == 255)).any(axis=1)
        direct = new[clipped].astype(np.float32) @ _TO_YCC.T + np.array([0, 128, 128], np.float32)
        moved[clipped] = np.clip(np.rint(direct), 0, 255)
        samples[rows, cols] = moved.astype(np.uint8)
    return Image.fromarray(samples, "YCbCr")


_buffer_lock = threading.Lock()


def _save_jpeg(im: Image.Image, **options) -> bytes:
    """Pillow guesses the room that optimised and progressive files need; where the guess is too small, give it more."""
    out = io.BytesIO()
    try:
        im.save(out, "JPEG", **options)
    except OSError:
        with _buffer_lock:
            old = ImageFile.MAXBLOCK
            ImageFile.MAXBLOCK = max(old, 8 * im.size[0] * im.size[1] + 65536)
            try:
                out = io.BytesIO()
                im.save(out, "JPEG", **options)
            finally:
                ImageFile.MAXBLOCK = old
    return out.getvalue()


def write_jpeg(photo: Photo, pixels: np.ndarray) -> bytes:
    params = photo.jpeg
    assert params is not None
    options = {"qtables": [list(t) for t in params.qtables], "progressive": params.progressive, "optimize": True}
    if photo.grey:
        im = luma_of(pixels)
    else:
        options["subsampling"] = max(params.subsampling, 0)
        options["keep_rgb"] = params.rgb
        im = Image.fromarray(pixels) if params.rgb else _ycc(photo, pixels)
    written = _save_jpeg(im, **options)
    segments, scan = _jpeg_segments(written)
    out = bytearray(b"\xff\xd8")
    own = [(bytes([m]), p) for m, p in segments if not (0xE0 <= m <= 0xED or m in (0xEF, 0xFE))]
    for name, payload in (*photo.chunks, *own):
        if len(payload) > 65533:
            raise ValueError("a metadata segment grew beyond 64 KiB")
        out += b"\xff" + name + (len(payload) + 2).to_bytes(2, "big") + payload
    return bytes(out + written[scan:])
