"""TIFF: read and write."""

from __future__ import annotations

import io

import numpy as np
from PIL import TiffImagePlugin

from pipelines.photos import metadata as photo_meta
from pipelines.photos.photo import Limits, Photo, PhotoError
from pipelines.photos.shared import check_size, dpi_of, planes_of, with_alpha

_TIFF_LOSSLESS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits")


def read_tiff(data: bytes, limits: Limits) -> Photo:
    # Pillow turns a TIFF by itself on loading (other formats not). It is handed an upright one, so that all formats go
    # the same way here.
    next(photo_meta.walk(data))  # Pillow reads a directory that is cut off; its tags could not be written back
    stored, orientation = photo_meta.without_orientation(data)
    im = TiffImagePlugin.TiffImageFile(io.BytesIO(stored))
    im.getexif()[photo_meta.ORIENTATION] = 1
    check_size(*im.size, limits)
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
    dpi, icc = dpi_of(im.info), im.info.get("icc_profile")
    xmp = tags.get(photo_meta.XMP_TAG)
    if orientation is None and isinstance(xmp, bytes):
        orientation = photo_meta.xmp_orientation(xmp)
    orientation = orientation or 1
    mode, predictor = im.mode, tags.get(317, 1)
    im.load()
    pixels, alpha = planes_of(im, orientation)
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


def write_tiff(photo: Photo, pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    compression, _, predictor = (photo.compression or "raw").partition("+")
    info = TiffImagePlugin.ImageFileDirectory_v2()
    if predictor:
        info[317] = 2
    with_alpha(photo, pixels).save(out, "TIFF", compression=compression, tiffinfo=info)
    size = (photo.width, photo.height)
    return photo_meta.merge_tiff(out.getvalue(), photo.source, size, photo.orientation >= 5)[0]
