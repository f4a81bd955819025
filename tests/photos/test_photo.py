"""Round trips of every format and orientation, and every kind of bad input. All pictures are made in memory."""

import base64
import io
import pickle
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from pipelines.photos.codec import decode, encode, sniff
from pipelines.photos.metadata import clean_exif, clean_irb, clean_xmp
from pipelines.photos.photo import Limits, PhotoError

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
FACE = (slice(40, 72), slice(48, 96))  # the pixels that the tests change, upright
NEAR = (slice(24, 88), slice(32, 112))  # and what a lossy codec may touch around them


def picture(h=112, w=144, noise=4.0):
    """uint8 (h, w, 3): smooth colours with some noise; sizes are no multiples of 32 on purpose."""
    y, x = np.mgrid[:h, :w]
    smooth = np.stack(
        [128 + 100 * np.sin(x / 17 + y / 31), 128 + 90 * np.cos(x / 23 - y / 19), 128 + 80 * np.sin((x + y) / 41)], -1
    )
    return np.clip(smooth + np.random.default_rng(0).normal(0, noise, smooth.shape), 0, 255).astype(np.uint8)


def save(pixels, fmt, mode=None, **options):
    im = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    (im.convert(mode) if mode else im).save(out, fmt, **options)
    return out.getvalue()


def reopen(data):
    """As any viewer would show it: RGB, orientation applied."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def protect(photo):
    """The pixels with a smooth change in FACE, of up to 40 grey levels and another one in each channel."""
    pixels = photo.pixels.copy()
    y, x, c = np.mgrid[:32, :48, :3]
    pixels[FACE] = np.clip(pixels[FACE] + np.rint(40 * np.sin(x / 9 + c) * np.sin(y / 7 - c)).astype(int), 0, 255)
    return pixels


def outside(a, b, region=NEAR):
    difference = np.abs(a.astype(int) - b.astype(int))
    difference[region] = 0
    return difference


def directory(bo, at, entries, following=0):
    """A TIFF directory for offset `at`: entries (tag, type, count, value), values as numbers or bytes."""
    head, data = struct.pack(bo + "H", len(entries)), b""
    data_at = at + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries):
        if isinstance(value, int):
            value = struct.pack(bo + ("H" if kind == 3 else "I"), value)
        if len(value) > 4:
            place = struct.pack(bo + "I", data_at + len(data))
            data += value + bytes(len(value) & 1)
            value = place
        head += struct.pack(bo + "HHI", tag, kind, count) + value.ljust(4, b"\0")
    return head + struct.pack(bo + "I", following) + data


def exif_with(orientation=1, thumbnail=b"", bo=">"):
    """An EXIF block: Exif and GPS directories, a maker note with a preview inside, IFD1 for the thumbnail if any."""
    block = bytearray({">": b"MM\0*", "<": b"II*\0"}[bo] + bytes(4))
    note = b"maker\0note " + b"\xff\xd8\xff\xdb\0\4\0\0\xff\xda\0\2preview\xff\xd9" + b" end"
    places = {}
    for name, entries in (
        ("exif", [(0x927C, 7, len(note), note), (0xA002, 4, 1, 144), (0xA003, 3, 1, 112)]),
        ("gps", [(1, 2, 2, b"N\0")]),
    ):
        places[name] = len(block)
        block += directory(bo, len(block), entries)
    ifd1 = 0
    if thumbnail:
        at = len(block)
        block += thumbnail + bytes(len(thumbnail) & 1)
        ifd1 = len(block)
        block += directory(bo, ifd1, [(0x0112, 3, 1, orientation), (0x0201, 4, 1, at), (0x0202, 4, 1, len(thumbnail))])
    entries = [
        (0x0112, 3, 1, orientation),
        (0x010F, 2, 6, b"Maker\0"),
        (0x0132, 2, 20, b"2020:02:03 04:05:06\0"),
        (0x8769, 4, 1, places["exif"]),
        (0x8825, 4, 1, places["gps"]),
    ]
    struct.pack_into(bo + "I", block, 4, len(block))
    return b"Exif\0\0" + bytes(block + directory(bo, len(block), entries, ifd1))


FORMATS = [
    ("JPEG", {"quality": 90}),
    ("JPEG", {"quality": 80, "subsampling": 0, "progressive": True}),
    ("JPEG", {"quality": 90, "subsampling": 1}),
    ("PNG", {}),
    ("WEBP", {"lossless": True}),
    ("WEBP", {"quality": 85}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", {"compression": "packbits"}),
    ("BMP", {}),
]
LOSSLESS = {"PNG", "TIFF", "BMP"}


def named(case):
    return case[0] + "-" + "-".join(map(str, case[1].values()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("case", FORMATS[:-1], ids=named)
def test_round_trip_in_every_orientation(case, orientation):
    fmt, options = case
    # TIFF takes its orientation from its own tags; Pillow writes them from an Exif object only.
    exif = exif_with(orientation)
    if fmt == "TIFF":
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = orientation, "Maker"
    data = save(picture(), fmt, exif=exif, icc_profile=ICC, **options)
    photo = decode(data)
    assert (photo.format, photo.orientation, photo.icc) == (fmt, orientation, ICC)
    assert photo.pixels.shape == ((112, 144, 3) if orientation < 5 else (144, 112, 3))
    np.testing.assert_array_equal(photo.pixels, reopen(data))

    written = encode(photo, protect(photo))
    again = decode(written)
    assert (again.format, again.orientation, again.icc) == (fmt, 1, ICC)
    im = Image.open(io.BytesIO(written))
    assert im.size == photo.pixels.shape[1::-1]
    assert im.getexif().get(ExifTags.Base.Orientation, 1) == 1
    assert im.getexif()[ExifTags.Base.Make] == "Maker"
    np.testing.assert_array_equal(reopen(written), again.pixels)

    if fmt in LOSSLESS or options.get("lossless"):
        np.testing.assert_array_equal(again.pixels, protect(photo))
    else:
        difference = outside(again.pixels, photo.pixels)
        limit = {"WEBP": (20, 1.7)}.get(fmt, (5, 0.02) if orientation == 1 else (16, 1.6))
        assert difference.max() <= limit[0] and difference.mean() <= limit[1]
        changed = np.abs(again.pixels[FACE].astype(int) - protect(photo)[FACE]).mean()
        assert changed < np.abs(again.pixels[FACE].astype(int) - photo.pixels[FACE]).mean()


@pytest.mark.parametrize("quality", [50, 75, 90, 95])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_parameters_are_kept(quality, subsampling, progressive):
    data = save(
        picture(),
        "JPEG",
        quality=quality,
        subsampling=subsampling,
        progressive=progressive,
        dpi=(72, 144),
        comment=b"hi",
    )
    photo = decode(data)
    written = encode(photo, protect(photo))
    old, new = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(written))
    assert new.quantization == old.quantization
    assert JpegImagePlugin.get_sampling(new) == JpegImagePlugin.get_sampling(old) == subsampling
    assert bool(new.info.get("progressive")) is progressive
    assert new.info["dpi"] == old.info["dpi"] == (72, 144)
    assert new.info["comment"] == b"hi"


def test_jpeg_own_tables_and_one_table_for_all():
    for tables in ([list(range(1, 65)), list(range(64, 0, -1)), [7] * 64], [[5] * 64]):
        data = save(picture(), "JPEG", qtables=tables)
        photo = decode(data)
        written = encode(photo, protect(photo))
        assert Image.open(io.BytesIO(written)).quantization == Image.open(io.BytesIO(data)).quantization


@pytest.mark.parametrize("subsampling", [1, 2])
def test_jpeg_keeps_untouched_blocks_better_than_saving_rgb_again(subsampling):
    data = save(picture(), "JPEG", quality=95, subsampling=subsampling)
    photo = decode(data)
    ours = outside(decode(encode(photo, photo.pixels)).pixels, photo.pixels)
    plain = save(photo.pixels, "JPEG", qtables=[list(t) for t in photo.jpeg.qtables], subsampling=subsampling)
    theirs = outside(reopen(plain), photo.pixels)
    assert ours.mean() < 0.7 * theirs.mean()


def test_jpeg_stored_as_rgb():
    data = save(picture(), "JPEG", quality=92, keep_rgb=True)
    photo = decode(data)
    assert photo.jpeg.rgb
    again = decode(encode(photo, protect(photo)))
    assert again.jpeg.rgb and outside(again.pixels, photo.pixels).max() <= 3


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2), (3, 5), (17, 2), (33, 31)])
@pytest.mark.parametrize("case", [*FORMATS, ("JPEG", {"quality": 90, "subsampling": 2})], ids=named)
def test_tiny_photos(case, size):
    data = save(picture(*size), case[0], **case[1])
    photo = decode(data)
    again = decode(encode(photo, photo.pixels))
    assert again.pixels.shape == (*size, 3)
    if case[0] in LOSSLESS:
        np.testing.assert_array_equal(again.pixels, photo.pixels)
    else:
        assert np.abs(again.pixels.astype(int) - photo.pixels).mean() < 8


def test_jpeg_of_pure_noise_at_full_quality():
    """More bytes than pixels: Pillow's own guess of the room needed is too small."""
    noise = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    photo = decode(save(noise, "JPEG", qtables=[[1] * 64] * 2, subsampling=0))
    assert np.abs(decode(encode(photo, photo.pixels)).pixels.astype(int) - photo.pixels).mean() < 1


# ---- metadata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bo", ["<", ">"])
def test_exif_is_corrected_in_place_and_pictures_removed(bo):
    thumbnail = save(picture(24, 32), "JPEG")
    block = exif_with(6, thumbnail, bo)
    photo = decode(save(picture(), "JPEG", quality=90, exif=block))
    assert any("embedded picture" in note for note in photo.notes)
    written = encode(photo, protect(photo))
    assert written.count(b"\xff\xd8\xff") == 1 and b"preview" not in written and thumbnail[20:60] not in written
    exif = Image.open(io.BytesIO(written)).getexif()
    assert exif[ExifTags.Base.Orientation] == 1 and exif[ExifTags.Base.DateTime] == "2020:02:03 04:05:06"
    assert exif.get_ifd(ExifTags.IFD.IFD1) == {}
    inner = exif.get_ifd(ExifTags.IFD.Exif)
    assert (inner[0xA002], inner[0xA003]) == (112, 144)
    assert inner[0x927C].startswith(b"maker\0note ") and inner[0x927C].endswith(b" end")
    assert exif.get_ifd(ExifTags.IFD.GPSInfo)[1] == "N"
    assert len(photo.exif) == len(block) - 6


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
def test_broken_exif_is_dropped_and_hurts_nobody():
    for block in (
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"x" * 50,
        b"Exif\0\0garbage" * 9,
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\0" * 40,
    ):
        data = save(picture(), "JPEG", quality=90, exif=block)
        photo = decode(data)
        assert photo.orientation == 1 and photo.exif is None
        assert b"Exif" not in encode(photo, photo.pixels)


def test_exif_loops_end():
    ifd = (
        struct.pack("<H", 2)
        + struct.pack("<HHII", 0x8769, 4, 1, 8)
        + struct.pack("<HHII", 0x014A, 4, 1, 8)
        + struct.pack("<I", 8)
    )
    block = b"II*\0\x08\0\0\0" + ifd
    assert len(clean_exif(block, (1, 1), True)[0]) == len(block)


XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:{p}="http://ns.adobe.com/tiff/1.0/" xmlns:exif="http://ns.adobe.com/exif/1.0/"
 xmlns:xmpGImg="http://ns.adobe.com/xap/1.0/g/img/"
 {p}:Orientation="6" exif:PixelXDimension="144" exif:PixelYDimension="112">
 <{p}:ImageWidth>144</{p}:ImageWidth><xmpGImg:image>{thumb}</xmpGImg:image><dc:title>Ümläut /9j/ no picture</dc:title>
</rdf:Description></rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize("prefix", ["tiff", "t"])
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_xmp_orientation_counts_where_exif_has_none_and_becomes_one(fmt, prefix):
    thumb = base64.encodebytes(save(picture(24, 32), "JPEG")).decode().replace("\n", "&#xA;")
    xmp = XMP.format(thumb=thumb, p=prefix).encode()
    options = {"xmp": xmp}
    if fmt == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options = {"pnginfo": info}
    if fmt == "TIFF":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[700] = xmp
        options = {"tiffinfo": tags}
    data = save(picture(), fmt, **options)
    photo = decode(data)
    assert photo.orientation == 6 and photo.pixels.shape == (144, 112, 3)
    if prefix == "tiff":  # Pillow knows no other
        np.testing.assert_array_equal(photo.pixels, reopen(data))
    written = encode(photo, protect(photo))
    assert b"/9j/4" not in written
    again = decode(written)
    assert again.orientation == 1
    text = again.xmp.decode()
    assert f'{prefix}:Orientation="1"' in text and "Ümläut /9j/ no picture" in text
    assert 'exif:PixelXDimension="112"' in text and f"<{prefix}:ImageWidth>112</" in text


def test_xmp_in_another_encoding_is_dropped():
    assert clean_xmp(XMP.format(thumb="", p="tiff").encode("utf-16"), (1, 1), True) == (None, 0)


def test_photoshop_thumbnails_go_and_captions_stay():
    def resource(number, body):
        return b"8BIM" + struct.pack(">HH", number, 0) + struct.pack(">I", len(body)) + body + b"\0" * (len(body) & 1)

    caption, thumb = resource(1028, b"\x1c\x02\x78\0\3abc"), resource(1036, b"\1\2\3" + save(picture(8, 8), "JPEG"))
    assert clean_irb(thumb + caption) == (caption, 1)
    assert clean_irb(caption + b"8BIM\xff\xff\0") == (caption, 0)
    assert clean_irb(caption[:-4]) == (b"", 0)
    block = b"Photoshop 3.0\0" + thumb + caption
    plain = save(picture(), "JPEG", quality=90)
    data = plain[:2] + b"\xff\xed" + struct.pack(">H", len(block) + 2) + block + plain[2:]
    written = encode(decode(data), decode(data).pixels)
    assert caption in written and written.count(b"\xff\xd8\xff") == 1


def test_further_pictures_in_a_jpeg_are_removed():
    out = io.BytesIO()
    first, second = Image.fromarray(picture()), Image.fromarray(picture()[::-1].copy())
    first.save(out, "MPO", save_all=True, append_images=[second])
    data = out.getvalue() + b"MotionPhoto_Data" + b"video" * 100
    assert Image.open(io.BytesIO(data)).n_frames == 2
    photo = decode(data)
    assert photo.format == "JPEG" and any("MPF" in note for note in photo.notes)
    written = encode(photo, photo.pixels)
    assert written.count(b"\xff\xd8\xff") == 1 and b"video" not in written and b"MPF" not in written


def test_png_chunks_are_kept():
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", "Ann")
    info.add_itxt("Title", "日本", zip=True)
    info.add(b"gAMA", struct.pack(">I", 45455))
    info.add(b"ruNk", b"unsafe? no: lower case says safe to copy")
    info.add(b"prVW", b"a preview, unsafe to copy")
    data = save(picture(), "PNG", pnginfo=info, dpi=(100, 200), icc_profile=ICC)
    written = encode(decode(data), decode(data).pixels)
    im = Image.open(io.BytesIO(written))
    assert im.text == {"Author": "Ann", "Title": "日本"} and im.info["gamma"] == 0.45455
    assert tuple(round(x) for x in im.info["dpi"]) == (100, 200) and im.info["icc_profile"] == ICC
    assert b"ruNk" in written and b"prVW" not in written


def test_imagemagick_exif_text_becomes_exif():
    block = exif_with(8)
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=True)
    data = save(picture(), "PNG", pnginfo=info)
    photo = decode(data)
    assert photo.orientation == 8
    im = Image.open(io.BytesIO(encode(photo, photo.pixels)))
    assert im.getexif()[ExifTags.Base.Orientation] == 1 and "Raw profile type exif" not in im.info


@pytest.mark.parametrize("bo", ["<", ">"])
def test_tiff_tags_are_kept(bo):
    """EXIF with a maker note, GPS, a description, resolution and a private tag, in both byte orders."""
    pixels = picture()
    tags = [
        (256, 3, 1, 144), (257, 3, 1, 112), (258, 3, 3, struct.pack(bo + "3H", 8, 8, 8)), (259, 3, 1, 1),
        (262, 3, 1, 2), (270, 2, 10, b"Ann & Bob\0"), (273, 4, 1, 8), (277, 3, 1, 3), (278, 3, 1, 112),
        (279, 4, 1, pixels.nbytes), (282, 5, 1, struct.pack(bo + "II", 300, 1)),
        (283, 5, 1, struct.pack(bo + "II", 300, 1)), (296, 3, 1, 2),
        (65000, 4, 1, 12345), (0x010F, 2, 6, b"Maker\0"), (0x0112, 3, 1, 6),
    ]  # fmt: skip
    data = bytearray({">": b"MM\0*", "<": b"II*\0"}[bo] + bytes(4) + pixels.tobytes())
    note = b"maker\0note " + b"\xff\xd8\xff\xdb\0\4\0\0\xff\xda\0\2preview\xff\xd9" + b" end"
    tags.append((0x8769, 4, 1, len(data)))
    data += directory(bo, len(data), [(0x927C, 7, len(note), note), (0xA002, 4, 1, 144), (0xA003, 3, 1, 112)])
    tags.append((0x8825, 4, 1, len(data)))
    data += directory(bo, len(data), [(1, 2, 2, b"N\0")])
    struct.pack_into(bo + "I", data, 4, len(data))
    data = bytes(data + directory(bo, len(data), tags))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), np.rot90(pixels, -1))

    photo = decode(data)
    assert photo.orientation == 6
    written = encode(photo, protect(photo))
    assert pixels.tobytes()[:2000] not in written
    im = Image.open(io.BytesIO(written))
    np.testing.assert_array_equal(np.asarray(im), protect(photo))
    assert im.tag_v2[270] == "Ann & Bob" and im.info["dpi"] == (300, 300) and im.tag_v2[65000] == 12345
    exif = im.getexif()
    assert exif.get(ExifTags.Base.Orientation, 1) == 1 and exif[ExifTags.Base.Make] == "Maker"
    inner = exif.get_ifd(ExifTags.IFD.Exif)
    assert (inner[0xA002], inner[0xA003]) == (112, 144)
    assert inner[0x927C].startswith(b"maker") and b"preview" not in inner[0x927C]
    assert exif.get_ifd(ExifTags.IFD.GPSInfo)[1] == "N"


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("predictor", [1, 2])
def test_tiff_compression_is_kept(compression, predictor):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    if predictor == 2 and compression in ("tiff_lzw", "tiff_adobe_deflate"):
        tags[317] = 2
    data = save(picture(600, 400), "TIFF", compression=compression, tiffinfo=tags)
    photo = decode(data)
    im = Image.open(io.BytesIO(encode(photo, protect(photo))))
    assert im.info["compression"] == compression and im.tag_v2.get(317) == tags.get(317)
    np.testing.assert_array_equal(np.asarray(im), protect(photo))


# ---- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in FORMATS if c[0] != "WEBP"], ids=named)
def test_greyscale_stays_greyscale(case):
    data = save(picture(), case[0], "L", **case[1])
    photo = decode(data)
    assert photo.grey and (photo.pixels[..., 0] == photo.pixels[..., 2]).all()
    written = encode(photo, protect(photo))
    assert Image.open(io.BytesIO(written)).mode == "L" or case[0] == "BMP"
    difference = outside(decode(written).pixels, photo.pixels)
    assert difference.max() <= (0 if case[0] in LOSSLESS else 3)


@pytest.mark.parametrize(
    ("fmt", "mode", "options"),
    [
        ("PNG", "RGBA", {}),
        ("PNG", "LA", {}),
        ("TIFF", "RGBA", {}),
        ("TIFF", "LA", {}),
        ("WEBP", "RGBA", {"lossless": True, "exact": True}),
        ("WEBP", "RGBA", {"quality": 80}),
    ],
)
def test_alpha_is_kept(fmt, mode, options):
    alpha = np.tile(np.arange(144, dtype=np.uint8) + 50, (112, 1))
    im = Image.fromarray(np.dstack([picture(), alpha])).convert(mode)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = save(im, fmt, exif=exif, **options)
    photo = decode(data)
    np.testing.assert_array_equal(photo.alpha, np.rot90(alpha, -1))
    again = decode(encode(photo, protect(photo)))
    assert again.mode == mode
    np.testing.assert_array_equal(again.alpha, photo.alpha)
    if options.get("quality") is None:
        assert outside(again.pixels, photo.pixels).max() == 0


def test_palette_becomes_true_colour():
    im = Image.fromarray(picture()).quantize(64)
    for fmt in ("PNG", "TIFF", "BMP"):
        photo = decode(save(im, fmt))
        again = decode(encode(photo, protect(photo)))
        assert (photo.mode, again.mode) == ("P", "RGB") and "palette: written as true colour" in photo.notes
        np.testing.assert_array_equal(again.pixels, protect(photo))
        np.testing.assert_array_equal(photo.pixels, np.asarray(im.convert("RGB")))


@pytest.mark.parametrize(("mode", "key"), [("P", 3), ("P", bytes(range(64))), ("L", 100), ("RGB", (1, 2, 3))])
def test_png_transparent_colours_become_alpha(mode, key):
    pixels = picture()
    pixels[:4] = key if mode == "RGB" else 100
    im = Image.fromarray(pixels)
    im = im.quantize(64) if mode == "P" else im.convert(mode)
    data = save(im, "PNG", transparency=key)
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    photo = decode(data)
    np.testing.assert_array_equal(np.dstack([photo.pixels, photo.alpha]), wanted)
    again = decode(encode(photo, photo.pixels))
    np.testing.assert_array_equal(np.dstack([again.pixels, again.alpha]), wanted)


def png_of(width, height, depth, colour, rows, *extra):
    def chunk(name, payload):
        return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
        + b"".join(chunk(*e) for e in extra)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("depth", [2, 4])
def test_png_greys_of_few_bits_with_a_transparent_one(depth):
    top = (1 << depth) - 1
    values = np.arange(16).reshape(2, 8) % (top + 1)
    per = 8 // depth
    rows = b""
    for row in values:
        packed = [
            sum(int(v) << (8 - depth * (i + 1)) for i, v in enumerate(row[j : j + per])) for j in range(0, 8, per)
        ]
        rows += b"\0" + bytes(packed)
    photo = decode(png_of(8, 2, depth, 0, rows, (b"tRNS", struct.pack(">H", 2))))
    np.testing.assert_array_equal(photo.pixels[..., 1], values * 255 // top)
    np.testing.assert_array_equal(photo.alpha, np.where(values == 2, 0, 255))
    again = decode(encode(photo, photo.pixels))
    np.testing.assert_array_equal(again.alpha, photo.alpha)
    np.testing.assert_array_equal(again.pixels, photo.pixels)


def test_bmp_of_32_bits_keeps_its_fourth_byte():
    pixels = np.dstack([picture(20, 30), np.full((20, 30), 77, np.uint8)])
    head = struct.pack("<IiiHHIIiiII", 40, 30, -20, 1, 32, 0, 0, 3000, 3000, 0, 0)
    data = b"BM" + struct.pack("<IHHI", 54 + pixels.nbytes, 0, 0, 54) + head + pixels[..., [2, 1, 0, 3]].tobytes()
    photo = decode(data)
    np.testing.assert_array_equal(photo.pixels, pixels[..., :3])
    assert encode(photo, photo.pixels) == data
    changed = 255 - photo.pixels
    np.testing.assert_array_equal(decode(encode(photo, changed)).pixels, changed)


# ---- refusals --------------------------------------------------------------------------------------------------------


def code_of(data, limits=None):
    with pytest.raises(PhotoError) as e:
        decode(data, limits)
    assert str(e.value) == f"{e.value.code}: {e.value.message}" and e.value.message
    return e.value.code


def test_no_pictures():
    assert code_of(b"") == "EMPTY"
    for data in (
        b"x",
        b"\0" * 5000,
        b"<html><body>404</body></html>",
        b"%PDF-1.4",
        bytes(range(256)),
        b"BM",
        b"RIFF\0\0\0\0WAVE",
    ):
        assert code_of(data) == "NOT_AN_IMAGE"


def test_other_formats_are_named():
    gif = save(Image.fromarray(picture()).quantize(32), "GIF")
    cases = {
        "GIF": gif,
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"x" * 90,
        "AVIF": save(picture(), "AVIF"),
        "JPEG 2000": save(picture(), "JPEG2000"),
        "Netpbm": save(picture(), "PPM"),
        "Photoshop": b"8BPS\0\1" + bytes(40),
        "Canon raw": b"II*\0\x10\0\0\0CR\2\0" + bytes(40),
        "BigTIFF": b"II+\0\x08\0\0\0" + bytes(40),
    }
    for name, data in cases.items():
        with pytest.raises(PhotoError, match=name) as e:
            decode(data)
        assert e.value.code == "UNSUPPORTED_FORMAT"


def test_animations_and_pages():
    frames = [Image.fromarray(picture(40, 40)), Image.fromarray(255 - picture(40, 40))]
    for fmt in ("WEBP", "PNG", "TIFF"):
        assert code_of(save(frames[0], fmt, save_all=True, append_images=frames[1:])) == "ANIMATED"
    gif = save(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert code_of(gif) == "UNSUPPORTED_FORMAT"


def test_modes_without_a_faithful_way_back():
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 999
    rows = b"".join(b"\0" + bytes(48) for _ in range(8))
    for data in (
        save(picture(), "JPEG", "CMYK"),
        save(picture(), "TIFF", "CMYK"),
        save(picture(), "TIFF", "LAB"),
        save(deep, "PNG"),
        save(deep, "TIFF"),
        png_of(8, 8, 16, 2, rows),
        save(picture(), "PNG", "1"),
        save(picture(), "BMP", "1"),
        save(picture(), "TIFF", "1"),
        save(picture(), "TIFF", compression="jpeg"),
        save(picture(), "TIFF", "F"),
    ):
        assert code_of(data) == "UNSUPPORTED_MODE"


@pytest.mark.parametrize("case", FORMATS, ids=named)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9, 0.99])
def test_truncated(case, share):
    data = save(picture(), case[0], **case[1])
    assert code_of(data[: int(len(data) * share)]) in ("TRUNCATED", "CORRUPT")
    if share > 0.5 and case[0] != "TIFF":  # a TIFF's directory may lie at its end
        assert code_of(data[: int(len(data) * share)]) == "TRUNCATED"


def test_wrong_checksum():
    data = bytearray(save(picture(), "PNG"))
    data[len(data) // 2] ^= 255
    assert code_of(bytes(data)) == "CORRUPT"


def huge_headers(width=30_000, height=30_000):
    """Small files whose headers promise 900 megapixels."""
    jpeg = bytearray(save(picture(16, 16), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", height, width)
    png = png_of(width, height, 8, 2, b"\0" * 1000)
    bmp = bytearray(save(picture(16, 16), "BMP"))
    bmp[18:26] = struct.pack("<ii", width, height)
    tiff = bytearray(save(picture(16, 16), "TIFF"))
    for i in range(8, len(tiff) - 12):
        if tiff[i : i + 2] in (b"\0\1", b"\1\1") and tiff[i + 2 : i + 8] in (b"\3\0\1\0\0\0", b"\4\0\1\0\0\0"):
            tiff[i + 8 : i + 12] = struct.pack("<I", width)
    webp = save(picture(16, 16), "WEBP", quality=80)
    payload = struct.pack("<I", 0)[:4] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + payload + webp[12:]
    webp = b"RIFF" + struct.pack("<I", len(body)) + body
    return {"JPEG": bytes(jpeg), "PNG": png, "BMP": bytes(bmp), "TIFF": bytes(tiff), "WEBP": webp}


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_huge_headers_are_refused_before_decoding(fmt):
    data = huge_headers()[fmt]
    start = time.perf_counter()
    assert code_of(data) == "TOO_LARGE"
    assert time.perf_counter() - start < 5


def test_a_bomb_that_really_unpacks():
    data = png_of(12_000, 12_000, 8, 0, b"\0" * 12_001 * 12_000)
    assert len(data) < 500_000 and code_of(data) == "TOO_LARGE"


def test_limits_are_configurable():
    data = save(picture(), "PNG")
    assert code_of(data, Limits(max_pixels=112 * 144 - 1)) == "TOO_LARGE"
    assert code_of(data, Limits(max_bytes=len(data) - 1)) == "TOO_LARGE"
    assert decode(data, Limits(max_pixels=112 * 144, max_bytes=len(data))).width == 144


def test_zero_sizes():
    assert code_of(png_of(0, 5, 8, 2, b"")) == "CORRUPT"


def test_content_decides_not_the_name():
    for fmt in ("PNG", "JPEG", "WEBP", "TIFF", "BMP"):
        assert sniff(save(picture(), fmt)) == decode(save(picture(), fmt)).format == fmt


def test_errors_and_photos_travel_between_processes():
    e = pickle.loads(pickle.dumps(PhotoError("EMPTY", "none")))  # our own bytes, made here
    assert (e.code, str(e)) == ("EMPTY", "EMPTY: none")
    photo = decode(save(picture(), "JPEG", quality=90))
    again = pickle.loads(pickle.dumps(photo))
    assert encode(again, protect(again)) == encode(photo, protect(photo))


def test_encode_refuses_other_shapes():
    photo = decode(save(picture(), "PNG"))
    for bad in (photo.pixels[:-1], photo.pixels.astype(np.float32), photo.pixels[..., 0]):
        with pytest.raises(ValueError, match="expected"):
            encode(photo, bad)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
def test_damaged_files_never_raise_anything_else():
    """Bit flips, cuts and swaps in good files of every kind: a photo that can be written again, or a PhotoError."""
    rng = np.random.default_rng(0)
    good = [
        save(picture(40, 50), f, exif=exif_with(6, save(picture(8, 8), "JPEG")), **o)
        for f, o in FORMATS
        if f not in ("BMP", "TIFF")
    ]
    good += [save(picture(40, 50), f, **o) for f, o in FORMATS if f in ("BMP", "TIFF")]
    seen = set()
    for _ in range(600):
        data = bytearray(good[rng.integers(len(good))])
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(len(data)) if rng.random() < 0.3 else rng.integers(min(400, len(data))))
            data[at] = rng.integers(256)
        if rng.random() < 0.2:
            data = data[: rng.integers(1, len(data))]
        try:
            photo = decode(bytes(data), Limits(max_pixels=1_000_000))
            encode(photo, photo.pixels)
            seen.add("ok")
        except PhotoError as e:
            seen.add(e.code)
    assert {"ok", "TRUNCATED", "CORRUPT"} <= seen
