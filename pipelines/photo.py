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

import io
import math
import re
import struct
import threading
import zlib
from dataclasses import dataclass, field

import numpy as np
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from scipy import ndimage

from pipelines import photo_meta
from pipelines.photo_meta import MetadataError

MAX_PIXELS = 100_000_000
MAX_BYTES = 512 * 1024 * 1024
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")

_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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


# ---- what is it? -----------------------------------------------------------------------------------------------------


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


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise PhotoError("CORRUPT", f"the header says {width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise PhotoError("TOO_LARGE", f"{width} x {height} pixels; the limit is {limits.max_pixels:,}")


def decode(data: bytes, limits: Limits | None = None) -> Photo:
    """Reads a photo. See the module's text for what is kept and what is refused.

    `data`: the whole file. The pixel limit is checked on the header, before any pixel is decoded.
    Raises PhotoError; nothing else leaves this function, whatever the bytes are (memory errors of the machine aside).
    """
    limits = limits or Limits()
    if len(data) > limits.max_bytes:
        raise PhotoError("TOO_LARGE", f"{len(data):,} bytes; the limit is {limits.max_bytes:,}")
    data = bytes(data)
    readers = {"JPEG": _read_jpeg, "PNG": _read_png, "WEBP": _read_webp, "TIFF": _read_tiff, "BMP": _read_bmp}
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
    writer = {"JPEG": _write_jpeg, "PNG": _write_png, "WEBP": _write_webp, "TIFF": _write_tiff, "BMP": _write_bmp}
    try:
        return writer[photo.format](photo, np.ascontiguousarray(pixels))
    except (OSError, ValueError, MetadataError, struct.error) as e:
        raise PhotoError("ENCODE_FAILED", f"{photo.format}: {e}") from e


# ---- shared ----------------------------------------------------------------------------------------------------------


def _upright(im: Image.Image, orientation: int) -> Image.Image:
    return im.transpose(_TURN[orientation]) if orientation in _TURN else im


def _planes(im: Image.Image, orientation: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Upright RGB pixels and alpha of an image of mode L, LA, RGB, RGBA, P (with or without transparency)."""
    if im.mode == "P":
        im = im.convert("RGBA" if im.has_transparency_data else "RGB")
    elif im.mode in ("L", "RGB") and "transparency" in im.info:
        im = im.convert(im.mode + "A")
    im = _upright(im, orientation)
    alpha = np.asarray(im.getchannel("A")).copy() if im.mode in ("LA", "RGBA") else None
    pixels = np.asarray(im if im.mode == "RGB" else im.convert("RGB")).copy()
    pixels.flags.writeable = False
    return pixels, alpha


def _orientation(exif: bytes | None, xmp: bytes | None) -> int:
    found = photo_meta.exif_orientation(exif) if exif else None
    if found is None and xmp:
        found = photo_meta.xmp_orientation(xmp)
    return found or 1


def _clean(
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


def _strip_exif_header(exif: bytes | None) -> bytes | None:
    while exif and exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    return exif or None


def _luma(pixels: np.ndarray) -> Image.Image:
    """Rec. 601 luma as Pillow computes it; exact for neutral pixels."""
    return Image.fromarray(pixels).convert("L")


def _dpi(info: dict) -> tuple[float, float] | None:
    dpi = info.get("dpi")
    try:
        dpi = (float(dpi[0]), float(dpi[1])) if dpi else None
    except (TypeError, ValueError, ZeroDivisionError, IndexError):
        return None
    return dpi if dpi and all(math.isfinite(x) and x > 0 for x in dpi) else None


# ---- JPEG ------------------------------------------------------------------------------------------------------------

_EXIF_ID, _XMP_ID, _IRB_ID = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"Photoshop 3.0\0"
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


def _read_jpeg(data: bytes, limits: Limits) -> Photo:
    segments, _ = _jpeg_segments(data)
    frame = next((payload for marker, payload in segments if marker in _SOF), None)
    if frame is None or len(frame) < 6:
        raise PhotoError("CORRUPT", "the JPEG has no frame header")
    precision, height, width, components = struct.unpack_from(">BHHB", frame)
    _check_size(width, height, limits)
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
        elif marker == 0xE1 and payload.startswith(_EXIF_ID) and exif is None:
            exif = _strip_exif_header(payload) or b""
            kept.append((b"EXIF", b""))
        elif marker == 0xE1 and payload.startswith(_XMP_ID) and xmp is None:
            xmp = payload[len(_XMP_ID) :]
            kept.append((b"XMP", b""))
        elif marker == 0xE2 and payload.startswith(b"ICC_PROFILE\0"):
            kept.append((name, payload))
        elif marker == 0xED and payload.startswith(_IRB_ID):
            irb, n = photo_meta.clean_irb(payload[len(_IRB_ID) :])
            if n:
                notes.append(f"removed {n} embedded picture(s) from Photoshop resources")
            if irb:
                kept.append((name, _IRB_ID + irb))
        elif marker == 0xFE:
            kept.append((name, payload))
        elif marker == 0xEE and payload.startswith(b"Adobe") and len(payload) >= 12:
            adobe = payload[11]
        elif 0xE0 <= marker <= 0xEF:
            label = payload.split(b"\0")[0][:24].decode("latin-1")
            notes.append(f"removed JPEG segment APP{marker - 0xE0} {label if label.isprintable() else ''}".rstrip())

    im = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    icc, dpi = im.info.get("icc_profile"), _dpi(im.info)
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

    orientation = _orientation(exif, xmp)
    exif, xmp = _clean(exif, xmp, (width, height), orientation, notes)
    chunks = []
    for name, payload in kept:
        if name == b"EXIF":
            name, payload = b"\xe1", _EXIF_ID + exif if exif else b""
        elif name == b"XMP":
            name, payload = b"\xe1", _XMP_ID + xmp if xmp else b""
        if payload:
            chunks.append((name, payload))
    im.load()
    pixels, _ = _planes(im, orientation)
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
    return np.asarray(_upright(Image.fromarray(samples, "YCbCr"), photo.orientation))


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


def _write_jpeg(photo: Photo, pixels: np.ndarray) -> bytes:
    params = photo.jpeg
    assert params is not None
    options = {"qtables": [list(t) for t in params.qtables], "progressive": params.progressive, "optimize": True}
    if photo.grey:
        im = _luma(pixels)
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


# ---- PNG -------------------------------------------------------------------------------------------------------------

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


def _read_png(data: bytes, limits: Limits) -> Photo:
    # IHDR first, so that the limit is checked before the file is walked.
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise PhotoError("TRUNCATED" if len(data) < 33 else "CORRUPT", "the PNG has no header")
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    _check_size(width, height, limits)
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
    exif = _strip_exif_header(exif)
    orientation = _orientation(exif, xmp)
    exif, xmp = _clean(exif, xmp, (width, height), orientation, notes)
    pixels, alpha = _planes(im, orientation)
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
        _dpi(im.info),
        chunks=tuple(kept),
        notes=tuple(notes),
    )


def _with_alpha(photo: Photo, pixels: np.ndarray) -> Image.Image:
    """The image to be written: L, LA, RGB or RGBA."""
    if photo.grey:
        im = _luma(pixels)
        return im if photo.alpha is None else Image.merge("LA", (im, Image.fromarray(photo.alpha)))
    return Image.fromarray(pixels if photo.alpha is None else np.dstack([pixels, photo.alpha]))


def _write_png(photo: Photo, pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    _with_alpha(photo, pixels).save(buffer, "PNG")
    chunks = _png_chunks(buffer.getvalue())
    out = bytearray(b"\x89PNG\r\n\x1a\n")
    for name, payload in (chunks[0], *photo.chunks, *(c for c in chunks[1:] if c[0] in (b"IDAT", b"IEND"))):
        out += (
            len(payload).to_bytes(4, "big") + name + payload + zlib.crc32(payload, zlib.crc32(name)).to_bytes(4, "big")
        )
    return bytes(out)


# ---- WebP ------------------------------------------------------------------------------------------------------------


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


def _read_webp(data: bytes, limits: Limits) -> Photo:
    # Sizes are checked by hand: Pillow's reader allocates the canvas as soon as it is made.
    chunks = _webp_chunks(data)
    if not chunks:
        raise PhotoError("CORRUPT", "an empty WebP")
    by_name = dict(reversed(chunks))
    if b"VP8X" in by_name and len(by_name[b"VP8X"]) >= 10:
        head = by_name[b"VP8X"]
        _check_size(int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1, limits)
        if head[0] & 2:
            raise PhotoError("ANIMATED", "an animated WebP")
    if b"VP8 " in by_name and len(by_name[b"VP8 "]) >= 10:
        width, height = struct.unpack_from("<HH", by_name[b"VP8 "], 6)
        _check_size(width & 0x3FFF, height & 0x3FFF, limits)
        lossless, quality = False, _webp_quality(_vp8_quantisers(by_name[b"VP8 "]))
    elif b"VP8L" in by_name and len(by_name[b"VP8L"]) >= 5:
        bits = int.from_bytes(by_name[b"VP8L"][1:5], "little")
        _check_size((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, limits)
        lossless, quality = True, None
    else:
        raise PhotoError("CORRUPT", "the WebP has no picture")
    im = WebPImagePlugin.WebPImageFile(io.BytesIO(data))
    exif, xmp = _strip_exif_header(im.info.get("exif")), im.info.get("xmp")
    im.load()
    notes: list[str] = []
    orientation = _orientation(exif, xmp)
    exif, xmp = _clean(exif, xmp, im.size, orientation, notes)
    pixels, alpha = _planes(im, orientation)
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


def _write_webp(photo: Photo, pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    how = {"lossless": True, "exact": True} if photo.lossless else {"quality": photo.quality, "alpha_quality": 100}
    _with_alpha(photo, pixels).save(
        out, "WEBP", exif=photo.exif or b"", xmp=photo.xmp or b"", icc_profile=photo.icc or b"", **how
    )
    return out.getvalue()


# ---- TIFF ------------------------------------------------------------------------------------------------------------

_TIFF_LOSSLESS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits")


def _read_tiff(data: bytes, limits: Limits) -> Photo:
    # Pillow turns a TIFF by itself on loading (other formats not). It is handed an upright one, so that all formats go
    # the same way here.
    next(photo_meta.walk(data))  # Pillow reads a directory that is cut off; its tags could not be written back
    stored, orientation = photo_meta.without_orientation(data)
    im = TiffImagePlugin.TiffImageFile(io.BytesIO(stored))
    im.getexif()[photo_meta.ORIENTATION] = 1
    _check_size(*im.size, limits)
    tags = im.tag_v2
    if 50706 in tags or 330 in tags:
        raise PhotoError("UNSUPPORTED_FORMAT", "camera raw, or a TIFF with further pictures inside: develop it first")
    if getattr(im, "n_frames", 1) > 1:
        raise PhotoError("ANIMATED", f"a TIFF of {im.n_frames} pages")
    depth = max(tags.get(258, (1,)))
    if depth > 8:
        raise PhotoError("UNSUPPORTED_MODE", f"{depth} bits a channel: convert it to 8 bits first")
    compression = im.info.get("compression", "raw")
    if compression not in _TIFF_LOSSLESS:
        raise PhotoError("UNSUPPORTED_MODE", f"TIFF compression {compression}: only lossless ones are written back")
    if im.mode not in ("L", "LA", "RGB", "RGBA", "P"):
        raise PhotoError("UNSUPPORTED_MODE", f"TIFF of mode {im.mode}: convert it to RGB first")
    dpi, icc = _dpi(im.info), im.info.get("icc_profile")
    xmp = tags.get(photo_meta.XMP_TAG)
    if orientation is None and isinstance(xmp, bytes):
        orientation = photo_meta.xmp_orientation(xmp)
    orientation = orientation or 1
    mode, predictor = im.mode, tags.get(317, 1)
    im.load()
    pixels, alpha = _planes(im, orientation)
    notes = ["palette: written as true colour"] if mode == "P" else []
    return Photo(
        pixels,
        "TIFF",
        mode,
        data,
        orientation,
        alpha,
        xmp=xmp if isinstance(xmp, bytes) else None,
        icc=icc,
        dpi=dpi,
        compression=compression if predictor != 2 else f"{compression}+predictor",
        notes=tuple(notes),
    )


def _write_tiff(photo: Photo, pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    compression, _, predictor = (photo.compression or "raw").partition("+")
    info = TiffImagePlugin.ImageFileDirectory_v2()
    if predictor:
        info[317] = 2
    _with_alpha(photo, pixels).save(out, "TIFF", compression=compression, tiffinfo=info)
    size = (photo.width, photo.height)
    return photo_meta.merge_tiff(out.getvalue(), photo.source, size, photo.orientation >= 5)[0]


# ---- BMP -------------------------------------------------------------------------------------------------------------


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


def _read_bmp(data: bytes, limits: Limits) -> Photo:
    head = struct.unpack_from("<I", data, 14)[0]
    width, height = struct.unpack_from("<HH" if head == 12 else "<ii", data, 18)
    _check_size(width, abs(height), limits)
    im = BmpImagePlugin.BmpImageFile(io.BytesIO(data))
    if im.mode == "1":
        raise PhotoError("UNSUPPORTED_MODE", "black-and-white (1 bit a pixel)")
    if im.mode not in ("L", "RGB", "RGBA", "P"):
        raise PhotoError("UNSUPPORTED_MODE", f"BMP of mode {im.mode}")
    im.load()
    _bmp_rows(data)
    pixels, _ = _planes(im, 1)
    notes = ["palette: written as true colour"] if im.mode == "P" else []
    return Photo(pixels, "BMP", im.mode, data, dpi=_dpi(im.info), notes=tuple(notes))


def _write_bmp(photo: Photo, pixels: np.ndarray) -> bytes:
    plain = _bmp_rows(photo.source)
    if plain is None:
        out = io.BytesIO()
        im = _luma(pixels) if photo.grey else Image.fromarray(pixels)
        im.save(out, "BMP", **({"dpi": photo.dpi} if photo.dpi else {}))
        return out.getvalue()
    offset, width, height, step, bottom_up = plain
    stride = width * step + 3 & ~3
    out = bytearray(photo.source)
    rows = np.frombuffer(out, np.uint8, stride * height, offset).reshape(height, stride)
    target = rows[:, : width * step].reshape(height, width, step)
    target[..., :3] = (pixels[::-1] if bottom_up else pixels)[..., ::-1]
    return bytes(out)
