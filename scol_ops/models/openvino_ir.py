"""Read the constants of an OpenVINO IR (``.xml`` graph + ``.bin`` blob) without OpenVINO.

An IR is an XML graph whose ``Const`` layers carry an element type, a shape, an offset and a size
into one flat little-endian binary file.  Nothing in it is executed: the XML is parsed with a
parser that resolves no external entities and every slice is bounds-checked.

Source: OpenVINO IR format, https://docs.openvino.ai/2025/documentation/openvino-ir-format.html
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

_DTYPES = {"f32": "<f4", "f16": "<f2", "i64": "<i8", "i32": "<i4"}


class IRFormatError(ValueError):
    """The IR is not one that this reader understands (missing layer, bad offset, unknown type)."""


def read_constants(xml: bytes, blob: bytes, source: str = "IR") -> list[tuple[str, np.ndarray, tuple[str, ...]]]:
    """Return every constant of an IR in file order.

    Args:
        xml: the graph file's content.
        blob: the weight file's content.
        source: a name for error messages.

    Returns:
        A list of ``(layer name, array, names of the layers that consume it)``; arrays are
        read-only views shaped as the graph says.

    Raises:
        IRFormatError: the XML is malformed, a type is unknown, or a slice leaves the blob.
    """
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise IRFormatError(f"{source}: not an OpenVINO IR: {error}") from error
    layers, edges = root.find("layers"), root.find("edges")
    if root.tag != "net" or layers is None or edges is None:
        raise IRFormatError(f"{source}: not an OpenVINO IR (root <{root.tag}>)")
    names = {layer.get("id"): layer.get("name", "") for layer in layers}
    consumers: dict[str, list[str]] = {}
    for edge in edges:
        consumers.setdefault(edge.get("from-layer", ""), []).append(names.get(edge.get("to-layer"), ""))
    constants = []
    for layer in layers:
        if layer.get("type") != "Const":
            continue
        data = layer.find("data")
        name = layer.get("name", "")
        if data is None or data.get("element_type") not in _DTYPES:
            raise IRFormatError(f"{source}: constant {name!r} has no readable element type")
        dtype = np.dtype(_DTYPES[data.get("element_type")])
        shape = tuple(int(part) for part in data.get("shape", "").split(",") if part.strip())
        offset, size = int(data.get("offset", "-1")), int(data.get("size", "-1"))
        expected = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if offset < 0 or size != expected or offset + size > len(blob):
            raise IRFormatError(f"{source}: constant {name!r} ({size} bytes at {offset}) does not fit its file")
        array = np.frombuffer(blob, dtype, expected // dtype.itemsize, offset).reshape(shape)
        constants.append((name, array, tuple(consumers.get(layer.get("id", ""), ()))))
    return constants


def read_ir(xml_path: Path) -> list[tuple[str, np.ndarray, tuple[str, ...]]]:
    """``read_constants`` on ``NAME.xml`` and the ``NAME.bin`` beside it."""
    xml_path = Path(xml_path)
    return read_constants(xml_path.read_bytes(), xml_path.with_suffix(".bin").read_bytes(), xml_path.name)
