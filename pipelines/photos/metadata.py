"""Metadata of a photo that is written back with other pixels: what is kept, corrected, and removed.

Kept as it is: camera data, dates, GPS, captions, colour profiles, also maker notes byte for byte at their old offsets.
Corrected: every orientation tag becomes 1, since the pixels are written upright; sizes are exchanged where the picture
was turned by 90 degrees. Removed: every embedded picture (EXIF thumbnail, previews in maker notes, Photoshop
thumbnails, base64 pictures in XMP), since it still shows the unprotected face.

Formats: TIFF 6.0 (sections 2 and 8), Exif 3.0 (JEITA CP-3451F, sections 4.5 and 4.6), XMP part 3 (Adobe 2020),
Photoshop image resources (Adobe Photoshop file formats specification, "Image resources section").
All functions work on bytes, read nothing outside the given buffer and never execute or import what they read.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

ORIENTATION = 0x0112
IMAGE_WIDTH, IMAGE_LENGTH = 0x0100, 0x0101
EXIF_IFD, GPS_IFD, INTEROP_IFD, SUB_IFDS = 0x8769, 0x8825, 0xA005, 0x014A
PIXEL_X, PIXEL_Y = 0xA002, 0xA003
STRIP_OFFSETS, STRIP_COUNTS = 0x0111, 0x0117
THUMB_OFFSET, THUMB_LENGTH = 0x0201, 0x0202
XMP_TAG, IRB_TAG, ICC_TAG = 0x02BC, 0x8649, 0x8773

# Bytes of one value, by TIFF type (6.0 section 2, and type 13 "IFD" of Adobe's TIFF Technical Note 1).
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_SWAP_UNIT = {3: 2, 4: 4, 5: 4, 8: 2, 9: 4, 10: 4, 11: 4, 12: 8, 13: 4}
_MAX_IFDS, _MAX_ENTRIES = 64, 4096
_MAX_SEGMENTS = 1024  # of a JPEG's header; a colour profile may take 255


class MetadataError(ValueError):
    """The block is not a readable TIFF structure."""


@dataclass(frozen=True)
class Entry:
    """One IFD entry: where it stands (`at`), its tag, type and count, and where its value's bytes lie."""

    at: int
    tag: int
    type: int
    count: int
    value_at: int
    nbytes: int


@dataclass
class Ifd:
    """One image file directory. `name` is ifd0, ifd1, exif, gps, interop or sub."""

    name: str
    at: int
    next_at: int
    entries: list[Entry] = field(default_factory=list)


def byte_order(block: bytes) -> str:
    """`<` or `>`, as `struct` spells it. Raises MetadataError where the block is no classic TIFF structure."""
    if block[:4] == b"II*\0":
        return "<"
    if block[:4] == b"MM\0*":
        return ">"
    raise MetadataError("no TIFF header")


def read_ifd(block: bytes, at: int, name: str) -> Ifd:
    """One directory at offset `at`; entries whose value lies outside the block are left out."""
    bo = byte_order(block)
    if not 8 <= at <= len(block) - 2:
        raise MetadataError(f"{name} lies outside the block")
    (n,) = struct.unpack_from(bo + "H", block, at)
    if n > _MAX_ENTRIES or at + 2 + 12 * n > len(block):
        raise MetadataError(f"{name} is cut off")
    ifd = Ifd(name, at, at + 2 + 12 * n)
    for pos in range(at + 2, ifd.next_at, 12):
        tag, kind, count = struct.unpack_from(bo + "HHI", block, pos)
        nbytes = TYPE_BYTES.get(kind, 0) * count
        value_at = pos + 8 if nbytes <= 4 else struct.unpack_from(bo + "I", block, pos + 8)[0]
        if nbytes and value_at + nbytes <= len(block):
            ifd.entries.append(Entry(pos, tag, kind, count, value_at, nbytes))
    return ifd


def integers(block: bytes, entry: Entry) -> list[int]:
    """The values of a BYTE, SHORT, LONG or IFD entry; an empty list for other types."""
    code = {1: "B", 3: "H", 4: "I", 13: "I"}.get(entry.type)
    if code is None or entry.count > 1 << 20:
        return []
    return list(struct.unpack_from(f"{byte_order(block)}{entry.count}{code}", block, entry.value_at))


def walk(block: bytes) -> Iterator[Ifd]:
    """IFD0 first, then all directories that it leads to (loop-safe, at most 64).

    Raises MetadataError where IFD0 cannot be read; directories below it that cannot be read are left out.
    """
    bo = byte_order(block)
    if len(block) < 8:
        raise MetadataError("cut off")
    todo = [(struct.unpack_from(bo + "I", block, 4)[0], "ifd0")]
    seen: set[int] = set()
    while todo and len(seen) < _MAX_IFDS:
        at, name = todo.pop(0)
        if at in seen:
            continue
        seen.add(at)
        try:
            ifd = read_ifd(block, at, name)
        except MetadataError:
            if name == "ifd0":
                raise
            continue
        yield ifd
        for entry in ifd.entries:
            below = {EXIF_IFD: "exif", GPS_IFD: "gps", INTEROP_IFD: "interop", SUB_IFDS: "sub"}.get(entry.tag)
            if below:
                todo += [(offset, below) for offset in integers(block, entry)]
        if name in ("ifd0", "ifd1") and ifd.next_at + 4 <= len(block):
            (following,) = struct.unpack_from(bo + "I", block, ifd.next_at)
            if following:
                todo.append((following, "ifd1"))


def exif_orientation(block: bytes) -> int | None:
    """Tag 0x0112 of IFD0; None where the tag or the whole structure is missing; 1 where its value is not 1 to 8."""
    try:
        ifd0 = next(walk(block))
    except MetadataError:
        return None
    for entry in ifd0.entries:
        if entry.tag == ORIENTATION:
            values = integers(block, entry)
            return values[0] if values and 1 <= values[0] <= 8 else 1
    return None


def without_orientation(block: bytes) -> tuple[bytes, int | None]:
    """The same bytes with IFD0's orientation tag set to 1, and the value it had (see `exif_orientation`)."""
    found = exif_orientation(block)
    if found in (None, 1):
        return block, found
    entry = next(e for e in next(walk(block)).entries if e.tag == ORIENTATION)
    head = struct.pack(byte_order(block) + "HHIHH", ORIENTATION, 3, 1, 1, 0)
    return block[: entry.at] + head + block[entry.at + 12 :], found


def blank_jpegs(buf: bytearray) -> int:
    """Zeroes every JPEG stream inside `buf` (found by walking its markers up to the scan); returns how many."""
    n, start = 0, buf.find(b"\xff\xd8\xff")
    while start >= 0:
        pos, tables, scan, segments = start + 2, False, False, 0
        while pos + 4 <= len(buf) and buf[pos] == 0xFF and not scan:
            marker = buf[pos + 1]
            if marker == 0xFF:
                pos += 1
                continue
            if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD9:
                break
            segments += 1
            if segments > _MAX_SEGMENTS:  # no camera's: taken for a picture, so that nothing is walked again and again
                scan = True
                break
            tables |= marker == 0xDB or marker in (0xC0, 0xC1, 0xC2)
            scan = marker == 0xDA
            pos += 2 + int.from_bytes(buf[pos + 2 : pos + 4], "big")
        if tables or scan:
            end = buf.find(b"\xff\xd9", min(pos, len(buf)))
            end = len(buf) if end < 0 else end + 2
            buf[start:end] = bytes(end - start)
            n += 1
        start = buf.find(b"\xff\xd8\xff", start + 1)
    return n


def clean_exif(block: bytes, size: tuple[int, int], turned: bool) -> tuple[bytes, int]:
    """An EXIF block (without the leading `Exif\\0\\0`) for upright pixels, of the same length.

    Orientation becomes 1 in every directory. With `turned`, the size tags become `size` = (width, height) of the
    upright picture. The thumbnail (IFD1) is unlinked and zeroed, as is every other JPEG stream in the block. All else
    keeps its place, so that offsets inside maker notes stay right. Returns the block and how many pictures were
    removed. Raises MetadataError where the block cannot be read.
    """
    bo = byte_order(block)
    buf, removed = bytearray(block), 0
    for ifd in walk(block):
        by_tag = {entry.tag: entry for entry in ifd.entries}
        if ORIENTATION in by_tag:
            struct.pack_into(bo + "HHIHH", buf, by_tag[ORIENTATION].at, ORIENTATION, 3, 1, 1, 0)
        if turned and ifd.name in ("ifd0", "exif"):
            for tags, value in (((IMAGE_WIDTH, PIXEL_X), size[0]), ((IMAGE_LENGTH, PIXEL_Y), size[1])):
                for entry in (by_tag[t] for t in tags if t in by_tag and by_tag[t].count == 1):
                    if entry.type == 4 or (entry.type == 3 and value < 1 << 16):
                        struct.pack_into(bo + ("I" if entry.type == 4 else "H"), buf, entry.value_at, value)
        if ifd.name == "ifd0" and ifd.next_at + 4 <= len(buf):
            buf[ifd.next_at : ifd.next_at + 4] = bytes(4)
        if ifd.name in ("ifd1", "sub"):
            removed += 1
            for at_tag, len_tag in ((THUMB_OFFSET, THUMB_LENGTH), (STRIP_OFFSETS, STRIP_COUNTS)):
                if at_tag in by_tag and len_tag in by_tag:
                    offsets, lengths = integers(block, by_tag[at_tag]), integers(block, by_tag[len_tag])
                    for at, n in zip(offsets, lengths, strict=False):
                        end = min(at + n, len(buf))
                        if 8 <= at < end:
                            buf[at:end] = bytes(end - at)
    removed += blank_jpegs(buf)
    return bytes(buf), removed


_PICTURE = re.compile(r"(?:/9j/|iVBORw0KGgo)(?:[A-Za-z0-9+/=\s]|&#x[aAdD];|&#1[03];){100,}")
_TIFF_NS, _EXIF_NS = "http://ns.adobe.com/tiff/1.0/", "http://ns.adobe.com/exif/1.0/"


def _property(text: str, namespace: str, name: str) -> re.Pattern[str]:
    """Matches a simple XMP property as attribute or element, whatever prefix the packet gives the namespace."""
    prefixes = {p for p, ns in re.findall(r"xmlns:([\w.-]+)\s*=\s*[\"']([^\"']*)[\"']", text) if ns == namespace}
    prefix = "|".join(map(re.escape, sorted(prefixes))) or re.escape(namespace.rsplit("/", 3)[1])
    return re.compile(rf"((?<![\w.-])(?:{prefix}):{name}(?:\s*=\s*[\"']|\s*>)\s*)(\d+)(\s*(?:[\"']|</))")


def xmp_orientation(xmp: bytes) -> int | None:
    """tiff:Orientation of an XMP packet (UTF-8), 1 to 8, or None."""
    try:
        text = xmp.decode("utf-8")
    except UnicodeDecodeError:
        return None
    found = _property(text, _TIFF_NS, "Orientation").search(text)
    return int(found[2]) if found and 1 <= int(found[2]) <= 8 else None


def clean_xmp(xmp: bytes, size: tuple[int, int], turned: bool) -> tuple[bytes | None, int]:
    """An XMP packet for upright pixels: orientation 1, sizes exchanged where `turned`, base64 pictures emptied.

    Returns (None, 0) for a packet that is not UTF-8 and could therefore not be checked. Else the packet and the number
    of pictures removed.
    """
    try:
        text = xmp.decode("utf-8")
    except UnicodeDecodeError:
        return None, 0
    text = _property(text, _TIFF_NS, "Orientation").sub(r"\g<1>1\g<3>", text)
    if turned:
        for namespace, names in (
            (_TIFF_NS, ("ImageWidth", "ImageLength")),
            (_EXIF_NS, ("PixelXDimension", "PixelYDimension")),
        ):
            for name, value in zip(names, size, strict=True):
                text = _property(text, namespace, name).sub(rf"\g<1>{value}\g<3>", text)
    text, removed = _PICTURE.subn("", text)
    return text.encode("utf-8"), removed


def clean_irb(data: bytes) -> tuple[bytes, int]:
    """Photoshop image resources without thumbnails (ids 1033, 1036) and without any resource that holds a JPEG stream.

    `data` starts at the first `8BIM`. What cannot be read is dropped from there on. Returns the rest and the number of
    resources removed.
    """
    kept, removed, pos = bytearray(), 0, 0
    while pos + 12 <= len(data) and data[pos : pos + 4] in (b"8BIM", b"MeSa", b"PHUT", b"AgHg", b"DCSR"):
        name_bytes = (data[pos + 6] + 2) & ~1
        size_at = pos + 6 + name_bytes
        if size_at + 4 > len(data):
            break
        size = int.from_bytes(data[size_at : size_at + 4], "big")
        end = size_at + 4 + size
        if end > len(data):
            break
        end += size & 1
        if int.from_bytes(data[pos + 4 : pos + 6], "big") in (1033, 1036) or b"\xff\xd8\xff" in data[size_at:end]:
            removed += 1
        else:
            kept += data[pos:end]
        pos = end
    return bytes(kept), removed


# ---- whole TIFF files ------------------------------------------------------------------------------------------------

# Not carried over: how the old pixels lay in the file, previews, and Photoshop's layers (37724) with the original.
_PIXEL_TAGS = {
    254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 280, 281, 284, 288, 289, 292, 293, 317, 320, 322, 323,
    324, 325, 330, 338, 339, 340, 341, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 34118,
    37724, 50255,
}  # fmt: skip


def _little(raw: bytes, kind: int, bo: str) -> bytes:
    unit = _SWAP_UNIT.get(kind)
    if bo == "<" or unit is None:
        return raw
    return b"".join(raw[i : i + unit][::-1] for i in range(0, len(raw), unit))


def _read_values(block: bytes, ifd: Ifd, skip: set[int]) -> dict[int, tuple[int, int, bytes]]:
    bo = byte_order(block)
    return {
        e.tag: (e.type, e.count, _little(block[e.value_at : e.value_at + e.nbytes], e.type, bo))
        for e in ifd.entries
        if e.tag not in skip
    }


def _write_ifd(out: bytearray, values: dict[int, tuple[int, int, bytes]]) -> int:
    """Appends a little-endian directory to `out`; returns its offset."""
    body, places = bytearray(), {}
    out += bytes(len(out) & 1)
    for tag, (_, _, raw) in values.items():
        if len(raw) > 4:
            places[tag] = len(out) + len(body)
            body += raw + bytes(len(raw) & 1)
    out += body
    at = len(out)
    out += struct.pack("<H", len(values))
    for tag in sorted(values):
        kind, count, raw = values[tag]
        out += struct.pack("<HHI", tag, kind, count)
        out += struct.pack("<I", places[tag]) if tag in places else raw.ljust(4, b"\0")
    out += bytes(4)
    return at


def merge_tiff(pixels: bytes, source: bytes, size: tuple[int, int], turned: bool) -> tuple[bytes, int]:
    """A little-endian TIFF with the strips of `pixels` and the descriptive tags of `source`, EXIF and GPS included.

    `pixels`: a TIFF of one picture as Pillow writes it, no metadata. `source`: the photo that it replaces.
    Orientation, sizes and embedded pictures: as in `clean_exif`. Returns the file and the number of pictures removed.
    Raises MetadataError where either cannot be read.
    """
    removed = 0
    new0 = next(walk(pixels))
    values = _read_values(pixels, new0, {STRIP_OFFSETS, ICC_TAG})
    strips = next((e for e in new0.entries if e.tag == STRIP_OFFSETS), None)
    counts = next((e for e in new0.entries if e.tag == STRIP_COUNTS), None)
    if strips is None or counts is None:
        raise MetadataError("no strips")
    out, offsets = bytearray(b"II*\0\0\0\0\0"), []
    for at, n in zip(integers(pixels, strips), integers(pixels, counts), strict=True):
        offsets.append(len(out))
        out += pixels[at : at + n] + bytes(n & 1)
    values[STRIP_OFFSETS] = (4, len(offsets), struct.pack(f"<{len(offsets)}I", *offsets))

    below: dict[str, dict[int, tuple[int, int, bytes]]] = {}
    old0: dict[int, tuple[int, int, bytes]] = {}
    for ifd in walk(source):
        if ifd.name == "ifd0":
            old0 = _read_values(source, ifd, _PIXEL_TAGS | {EXIF_IFD, GPS_IFD})
        elif ifd.name in ("exif", "gps", "interop") and ifd.name not in below:
            below[ifd.name] = _read_values(source, ifd, {INTEROP_IFD, 330})
    for tags in (old0, *below.values()):
        for tag, (kind, count, raw) in list(tags.items()):
            if tag == ORIENTATION:
                tags[tag] = (3, 1, b"\1\0")
            elif tag == XMP_TAG:
                xmp, n = clean_xmp(raw, size, turned)
                removed += n
                if xmp is None:
                    del tags[tag]
                else:
                    tags[tag] = (kind, len(xmp), xmp)
            elif tag == IRB_TAG:
                irb, n = clean_irb(raw)
                removed += n
                tags[tag] = (kind, len(irb), irb)
                if not irb:
                    del tags[tag]
            elif tag in (PIXEL_X, PIXEL_Y) and turned:
                tags[tag] = (4, 1, struct.pack("<I", size[tag == PIXEL_Y]))
            elif tag != ICC_TAG and b"\xff\xd8\xff" in raw:
                buf = bytearray(raw)
                removed += blank_jpegs(buf)
                tags[tag] = (kind, count, bytes(buf))
    if "interop" in below and "exif" in below:
        below["exif"][INTEROP_IFD] = (4, 1, struct.pack("<I", _write_ifd(out, below["interop"])))
    for name, tag in (("exif", EXIF_IFD), ("gps", GPS_IFD)):
        if below.get(name):
            old0[tag] = (4, 1, struct.pack("<I", _write_ifd(out, below[name])))
    struct.pack_into("<I", out, 4, _write_ifd(out, {**old0, **values}))
    return bytes(out), removed
