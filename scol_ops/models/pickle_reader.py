"""Tensors and plain containers out of pickles that nobody trusts, without running anything that they say.

This is no unpickler: ``pickletools`` of the standard library splits the file into its instructions, and the little
machine below keeps what they build as data.  Where a pickle asks for a class or a function to be called, nothing is
imported and nothing is called: tensors are described (``TensorRef``), ordered dicts become dicts, and everything else
becomes ``Skipped``, an inert note of what was asked for with the state that came with it, so that a module's tensors
can still be found.  What was skipped is counted and told.

Reads the three forms in which PyTorch weights are published: the zip archive of ``torch.save``, its older stream
(magic number, five pickles, raw storages), and plain pickles of module objects (NVIDIA's ``.pkl``), whose storages lie
inside as bytes of the older stream.  Memory: the file's own size, plus each tensor that is asked for.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MAX_OPERATIONS = 5_000_000
_MAX_MODULES = 20_000
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Expanded tensors (a stride of 0) take more memory than the file has; a repeated row is fine, a bomb is not.
_MAX_EXPANDED = 1 << 24

_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}  # fmt: skip


class UnreadableFile(ValueError):
    """Not a file of a known form, or a broken or malicious one; the message says what is wrong with it."""


@dataclass(frozen=True)
class Global:
    """A name that the pickle wants imported. It is not."""

    name: str


@dataclass
class Skipped:
    """An object that was not made: what it would have been, and the state that it would have been given."""

    name: str
    # Not shown: objects may hold each other so often that their text has no end.
    state: Any = field(default=None, repr=False)
    items: dict[Any, Any] = field(default_factory=dict, repr=False)

    def attributes(self) -> Mapping[Any, Any]:
        """The state as a mapping: attributes, or entries of a mapping's subclass; empty where there is none."""
        return self.items or (self.state if isinstance(self.state, dict) else {})


@dataclass
class Storage:
    """Raw numbers of one dtype; ``content`` is filled when the file has told where they lie."""

    dtype: torch.dtype
    numel: int
    content: bytes | memoryview | None = field(default=None, repr=False)

    @property
    def bytes_wanted(self) -> int:
        return self.numel * self.dtype.itemsize

    def fill(self, content: bytes | memoryview) -> None:
        if len(content) != self.bytes_wanted:
            raise UnreadableFile(f"a storage of {self.numel} {self.dtype} has {len(content)} bytes")
        self.content = content


@dataclass(frozen=True)
class TensorRef:
    """A tensor in the file. ``shape`` can be looked at before a byte of it is copied."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def numel(self) -> int:
        total = 1
        for n in self.shape:
            total *= n
        return total

    def read(self) -> Tensor:
        """A copy, contiguous.

        Raises:
            UnreadableFile: it reaches beyond its storage, or expands to more than is sensible.
        """
        if self.storage.content is None:
            raise UnreadableFile("a tensor's numbers are not in the file")
        if self.numel() == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        if last >= self.storage.numel:
            raise UnreadableFile(f"a tensor of shape {self.shape} reaches beyond its storage of {self.storage.numel}")
        if self.numel() > max(self.storage.numel, _MAX_EXPANDED):
            raise UnreadableFile(f"a tensor of shape {self.shape} repeats a storage of {self.storage.numel} too often")
        size = self.dtype.itemsize
        part = bytearray(self.storage.content[self.offset * size : (last + 1) * size])
        if self.dtype == torch.bool:  # any byte but 0 and 1 is no bool
            raw = torch.frombuffer(part, dtype=torch.uint8) != 0
        else:
            raw = torch.frombuffer(part, dtype=self.dtype)
        return raw.as_strided(self.shape, self.stride).clone(memory_format=torch.contiguous_format)


@dataclass
class Tree:
    """A file's content.

    Attributes:
        value: plain values, dicts, lists, tuples, ``TensorRef`` and ``Skipped``.
        form: ``zip``, ``stream`` or ``pickle``.
        skipped: names of the file's code that was not run -> how often it was asked for.
    """

    value: Any
    form: str
    skipped: Counter[str]


def read(content: bytes) -> Tree:
    """Read a file by its content.

    Raises:
        UnreadableFile: see there.
    """
    skipped: Counter[str] = Counter()
    try:
        if content[:4] == b"PK\x03\x04":
            return Tree(_read_zip(content, skipped), "zip", skipped)
        if content.startswith(_LEGACY_START):
            return Tree(_read_stream(content, skipped), "stream", skipped)
        if content[:1] == b"\x80":
            return Tree(_Machine(skipped).run(io.BytesIO(content)), "pickle", skipped)
    except UnreadableFile:
        raise
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, OverflowError) as error:
        raise UnreadableFile(f"broken file: {error}") from error
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError, MemoryError) as error:
        # pickletools' complaints are ValueErrors; the rest is what instructions meet that do not fit each other
        raise UnreadableFile(f"broken pickle: {type(error).__name__}: {error}") from error
    raise UnreadableFile("neither a PyTorch file nor a pickle")


# ---- forms of files --------------------------------------------------------------------------------------------------


def _read_zip(content: bytes, skipped: Counter[str]) -> Any:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        for entry in entries:
            name = entry.filename
            if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
                raise UnreadableFile(f"the archive has an entry that points out of it: {name!r}")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise UnreadableFile(f"the archive's entry {name!r} is compressed, PyTorch's are not")
        known = set(names)
        if len(known) < len(names):
            raise UnreadableFile("the archive has two entries of one name")
        if sum(entry.file_size for entry in entries) > len(content):
            raise UnreadableFile("the archive's entries are larger than the archive")
        pickles = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise UnreadableFile("the archive is not of torch.save: it has not one data.pkl")
        root = pickles[0].split("/")[0]
        if f"{root}/byteorder" in known and archive.read(f"{root}/byteorder").strip() != b"little":
            raise UnreadableFile("the archive's numbers are big-endian")

        def load(storage: Storage, key: str) -> None:
            name = f"{root}/data/{key}"
            if name not in known:
                raise UnreadableFile(f"the archive lacks {name!r}")
            if archive.getinfo(name).file_size != storage.bytes_wanted:
                raise UnreadableFile(
                    f"{name!r} has {archive.getinfo(name).file_size} bytes, its tensor wants {storage.bytes_wanted}"
                )
            storage.fill(archive.read(name))

        return _Machine(skipped, load).run(io.BytesIO(archive.read(pickles[0])))


def _read_stream(content: bytes, skipped: Counter[str]) -> Any:
    stream = io.BytesIO(content)
    plain = _Machine(skipped)
    if plain.run(stream) != _MAGIC or plain.run(stream) != _PROTOCOL:
        raise UnreadableFile("not torch.save's stream")
    system = plain.run(stream)
    if isinstance(system, dict) and system.get("little_endian", True) is not True:
        raise UnreadableFile("the file's numbers are big-endian")
    storages: dict[str, Storage] = {}
    value = _Machine(skipped, storages=storages).run(stream)
    order = plain.run(stream)
    if not isinstance(order, list) or set(order) != set(storages):
        raise UnreadableFile("the file's list of storages is not that of its tensors")
    view = memoryview(content)
    at = stream.tell()
    for key in order:
        count = int.from_bytes(view[at : at + 8], "little", signed=True)
        at += 8
        size = storages[key].bytes_wanted
        if count != storages[key].numel or size > len(content) - at:
            raise UnreadableFile(f"a storage of {storages[key].numel} numbers is not wholly in the file")
        storages[key].fill(view[at : at + size])
        at += size
    return value


# ---- the machine -----------------------------------------------------------------------------------------------------

_MARK = object()
_KEYS = (str, int, float, bytes, bool, type(None))


class _Machine:
    """One stack machine for one pickle after another; see the module.

    Args:
        skipped: counts what is not made.
        load: fills a storage by its key at once (zip); None collects storages in ``storages`` (stream).
    """

    def __init__(
        self,
        skipped: Counter[str],
        load: Callable[[Storage, str], None] | None = None,
        storages: dict[str, Storage] | None = None,
    ) -> None:
        self.skipped, self.load = skipped, load
        self.storages: dict[str, Storage] = {} if storages is None else storages
        self.external = load is not None or storages is not None
        self.reducers: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": _ordered_dict,
            "torch._utils._rebuild_tensor": _tensor,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "torch.storage._load_from_bytes": self._nested,
            "torch_utils.persistence._reconstruct_persistent_obj": self._persistent,
            "torch.Size": lambda sizes=(): tuple(sizes),
            "_codecs.encode": _encode,
            "builtins.set": lambda items=(): list(items),
            "__builtin__.set": lambda items=(): list(items),
        }

    def run(self, stream: io.BytesIO) -> Any:
        """The value of the pickle that begins here; the stream is left behind it."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}

        def to_mark() -> list[Any]:
            for i in range(len(stack) - 1, -1, -1):
                if stack[i] is _MARK:
                    found = stack[i + 1 :]
                    del stack[i:]
                    return found
            raise UnreadableFile("broken pickle: no mark")

        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPERATIONS:
                raise UnreadableFile(f"a pickle of more than {MAX_OPERATIONS} instructions")
            name = opcode.name
            if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _LITERALS:
                stack.append(argument)
            elif name in ("PROTO", "FRAME"):
                pass
            elif name == "STOP":
                value = stack.pop()
                return self._nothing_of_ours(value)
            elif name == "MARK":
                stack.append(_MARK)
            elif name == "POP":
                stack.pop()
            elif name == "POP_MARK":
                to_mark()
            elif name == "DUP":
                stack.append(stack[-1])
            elif name == "EMPTY_LIST" or name == "EMPTY_SET":
                stack.append([])
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "EMPTY_TUPLE":
                stack.append(())
            elif name in ("LIST", "FROZENSET"):
                stack.append(list(to_mark()))
            elif name == "TUPLE":
                stack.append(tuple(to_mark()))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                n = int(name[-1])
                if len(stack) < n:
                    raise UnreadableFile("broken pickle: the stack is empty")
                stack[-n:] = [tuple(stack[-n:])]
            elif name == "DICT":
                items = to_mark()
                stack.append({})
                self._set(stack[-1], items)
            elif name in ("APPEND", "APPENDS", "ADDITEMS"):
                items = [stack.pop()] if name == "APPEND" else to_mark()
                if isinstance(stack[-1], list):
                    stack[-1].extend(items)
            elif name == "SETITEM":
                item = stack.pop()
                key = stack.pop()
                self._set(stack[-1], [key, item])
            elif name == "SETITEMS":
                items = to_mark()
                self._set(stack[-1], items)
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name == "GLOBAL":
                stack.append(Global(argument.replace(" ", ".")))
            elif name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(Global(f"{module}.{attribute}") if _words(module, attribute) else self._skip("?"))
            elif name == "REDUCE":
                arguments = stack.pop()
                stack.append(self._call(stack.pop(), arguments))
            elif name == "NEWOBJ":
                arguments = stack.pop()
                stack.append(self._make(stack.pop(), arguments))
            elif name == "NEWOBJ_EX":
                stack.pop()
                arguments = stack.pop()
                stack.append(self._make(stack.pop(), arguments))
            elif name == "INST":
                stack.append(self._make(Global(argument.replace(" ", ".")), to_mark()))
            elif name == "OBJ":
                items = to_mark()
                stack.append(self._make(items[0], items[1:]))
            elif name == "BUILD":
                state = stack.pop()
                self._build(stack[-1], state)
            elif name in ("PERSID", "BINPERSID"):
                stack.append(self._persistent_id(argument if name == "PERSID" else stack.pop()))
            else:
                raise UnreadableFile(f"a pickle with the instruction {name}, which weights have no use for")
        raise UnreadableFile("broken pickle: it does not end")

    # -- what instructions make

    def _skip(self, name: str, state: Any = None) -> Skipped:
        self.skipped[name] += 1
        return Skipped(name, state)

    def _nothing_of_ours(self, value: Any) -> Any:
        if value is _MARK:
            raise UnreadableFile("broken pickle: it ends in a mark")
        return value

    def _set(self, target: Any, items: Sequence[Any]) -> None:
        into = target if isinstance(target, dict) else target.items if isinstance(target, Skipped) else None
        if into is None or len(items) % 2:
            raise UnreadableFile("broken pickle: entries for what is no mapping")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nested tuples would be hashed again and again, at a cost that grows without limit.
            if not isinstance(key, _KEYS):
                self.skipped["an entry whose key is no word or number"] += 1
                continue
            into[key] = value

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global):
            return self._skip("a call of " + (function.name if isinstance(function, Skipped) else "a value"))
        reducer = self.reducers.get(function.name)
        if reducer is None or not isinstance(arguments, tuple):
            if function.name == "copyreg._reconstructor" and isinstance(arguments, tuple) and arguments:
                return self._make(arguments[0], ())
            return self._skip(function.name)
        return reducer(*arguments)

    def _make(self, kind: Any, arguments: Any) -> Any:
        name = kind.name if isinstance(kind, Global | Skipped) else "a value"
        if name == "collections.OrderedDict":
            return _ordered_dict(*arguments)
        return self._skip(name)

    def _build(self, target: Any, state: Any) -> None:
        if isinstance(target, Skipped):
            # (dict, slots) where a class has slots
            if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict):
                state = state[0]
            target.state = state
        # State of a dict (an OrderedDict's `_metadata`) or of a tensor says nothing that counts.

    def _persistent(self, meta: Any) -> Any:
        described = meta if isinstance(meta, dict) else meta.attributes() if isinstance(meta, Skipped) else {}
        name = described.get("class_name")
        return self._skip(f"source code of {name}" if isinstance(name, str) else "source code", described.get("state"))

    def _nested(self, content: Any) -> Any:
        if not isinstance(content, bytes):
            raise UnreadableFile("a storage without bytes")
        value = _read_stream(content, self.skipped)
        if not isinstance(value, Storage):
            raise UnreadableFile("a storage that is none")
        return value

    def _persistent_id(self, value: Any) -> Any:
        if isinstance(value, tuple) and len(value) >= 2 and value[0] == "module":
            return value[1]  # the older torch.save's way to keep a module's source beside it
        if not self.external or not isinstance(value, tuple) or len(value) < 5 or value[0] != "storage":
            raise UnreadableFile("a reference to something outside the file")
        _, kind, key, _, numel = value[:5]
        view = value[5] if len(value) > 5 else None
        dtype = _DTYPES.get(kind.name.rpartition(".")[2]) if isinstance(kind, Global) else None
        if dtype is None or not isinstance(key, str) or not _count(numel):
            raise UnreadableFile("a storage of an unknown kind")
        if view is not None:
            raise UnreadableFile("a storage that is part of another one")
        if key not in self.storages:
            storage = Storage(dtype, numel)
            if self.load is not None:
                self.load(storage, key)
            self.storages[key] = storage
        found = self.storages[key]
        if (found.dtype, found.numel) != (dtype, numel):
            raise UnreadableFile("two descriptions of one storage")
        return found


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip


def _words(*values: Any) -> bool:
    return all(isinstance(v, str) for v in values)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    pairs = [p for p in items if isinstance(p, tuple | list) and len(p) == 2] if isinstance(items, list) else []
    return {k: v for k, v in pairs if isinstance(k, _KEYS)}


def _encode(text: Any, encoding: Any = "latin1", *_: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnreadableFile("bytes in an encoding that weights have no use for")
    return text.encode("latin-1")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRef:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise UnreadableFile("a tensor without a storage or a shape")
    if len(shape) != len(stride) or len(shape) > 16 or not all(map(_count, (offset, *shape, *stride))):
        raise UnreadableFile("a tensor of an impossible shape")
    return TensorRef(storage, offset, tuple(shape), tuple(stride))


# ---- modules ---------------------------------------------------------------------------------------------------------


def module_state(module: Skipped) -> dict[str, TensorRef]:
    """Entries of a ``torch.nn.Module`` that was pickled whole, named as its ``state_dict`` would name them.

    Raises:
        UnreadableFile: more modules than a network has.
    """
    found: dict[str, TensorRef] = {}
    waiting = [("", module)]
    for _ in range(_MAX_MODULES):
        if not waiting:
            return found
        prefix, one = waiting.pop()
        attributes = one.attributes()
        hidden = attributes.get("_non_persistent_buffers_set")
        for group in ("_parameters", "_buffers"):
            for name, value in _entries(attributes.get(group)):
                if isinstance(value, TensorRef) and not (isinstance(hidden, list) and name in hidden):
                    found[prefix + name] = value
        for name, inner in _entries(attributes.get("_modules")):
            if isinstance(inner, Skipped):
                waiting.append((f"{prefix}{name}.", inner))
    raise UnreadableFile(f"more than {_MAX_MODULES} modules")


def _entries(value: Any) -> list[tuple[str, Any]]:
    mapping = value if isinstance(value, dict) else value.attributes() if isinstance(value, Skipped) else {}
    return [(k, v) for k, v in mapping.items() if isinstance(k, str)]
