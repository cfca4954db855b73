"""Reads a pickle of torch as plain values: dictionaries, lists, numbers, text and descriptions of tensors.

Python's own unpickler, restricted or not, calls what a file names. torch's reader of weights only still builds classes that a program
has allowed, and sets their state. This machine interprets the few operations that a state dict is written with. It imports nothing and
calls nothing that a file names: a name is compared with a list, and any other is refused.

Invariant: whatever the bytes, the result is a tree of plain values, or an error that names what was refused.
"""

import pickletools
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from merge_service.errors import CheckpointError, CorruptCheckpoint

MAX_STEPS = 20_000_000
"""Most operations of a pickle; a state dict of 20,000 tensors has about a million."""
MAX_TEXT = 1 << 20
"""Most bytes of one text or number."""
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}  # fmt: skip
NUMBERS = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "bool": "BOOL",
}  # fmt: skip
_CALLS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch", "device"),
}
RECORDS = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
}  # fmt: skip
"""What the description of a distributed checkpoint is made of. Each becomes a `Record`; none is imported or called."""
ZERO_RECORDS = {
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
}
"""The same of the files in which DeepSpeed's ZeRO keeps the parts of its optimizers."""
_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING", "BINSTRING", "UNICODE", "STRING"}
_PLAIN = _TEXT | {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MADE: dict[str, Any] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Name:
    """A name that a pickle uses, which stands for nothing but itself."""

    module: str
    name: str


@dataclass(frozen=True)
class Storage:
    """Where a tensor's numbers are: the key of a storage in the file, its dtype and its number of elements."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class Strided:
    """A tensor as a view of a storage; all counts are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class Record:
    """An object that was pickled, as plain values: the name of its class, what it was made with, and its state."""

    name: str
    given: tuple[Any, ...]
    state: Any = None

    def part(self, name: str) -> Any:
        """A field of the state, None if there is none."""
        return self.state.get(name) if isinstance(self.state, Mapping) else None


class _Bounded:
    """A stream that gives no more at a time than a name or a number needs, whatever length the file claims."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.tell = stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_TEXT:
            raise ValueError(f"it claims a text or number of {size} bytes")
        return self._stream.read(size)

    def readline(self) -> bytes:
        return self._stream.readline(MAX_TEXT)


class _Mark:
    """The place of a mark on the stack."""


def read(stream: IO[bytes], path: Path, records: Container[tuple[str, str]] = ()) -> Any:
    """The value of the pickle that begins in `stream`, which is left behind its end. Objects of the classes `records` (module, name)
    become `Record`s.

    Raises `CheckpointError` naming a class or function that no tensor or dictionary is made of, and `CorruptCheckpoint` for
    anything that is no pickle.
    """
    machine = _Machine(path, records)
    try:
        for count, (opcode, argument, _) in enumerate(
            pickletools.genops(cast("IO[bytes]", _Bounded(stream)))
        ):
            if count > MAX_STEPS:
                raise CorruptCheckpoint(f"{path} has more than {MAX_STEPS} operations; no state dict does")
            machine.step(opcode.name, argument)
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        UnicodeError,
    ) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CorruptCheckpoint(f"{path} is not a usable pickle of torch: {str(error)[:200]}") from None
    return machine.stack[-1]


class _Machine:
    def __init__(self, path: Path, records: Container[tuple[str, str]]) -> None:
        self.path, self.records = path, records
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carry out one operation."""
        stack = self.stack
        if name in _PLAIN:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _MADE:
            stack.append(_MADE[name]())
        elif name == "MARK":
            stack.append(_Mark())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("TUPLE", "LIST", "DICT"):
            items = self._since_mark()
            stack.append(tuple(items) if name == "TUPLE" else items if name == "LIST" else _pairs(items))
        elif name in ("SETITEM", "SETITEMS", "APPEND", "APPENDS"):
            self._add(name)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            module, word = argument.split(" ", 1) if name == "GLOBAL" else (stack.pop(-2), stack.pop())
            stack.append(self._known(str(module), str(word)))
        elif name in ("REDUCE", "NEWOBJ"):
            given = stack.pop()
            stack.append(self._called(stack.pop(), given))
        elif name == "BUILD":  # the state of a dictionary: versions of modules, which no tensor needs
            state = stack.pop()
            assert isinstance(stack[-1], dict | Strided | Record), "it gives a state to what has none"
            if isinstance(stack[-1], Record):
                stack[-1].state = state
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise CheckpointError(
                f"{self.path} uses {name}, which no state dict needs; it is not read further"
            )

    def _since_mark(self) -> list[Any]:
        at = max(place for place, value in enumerate(self.stack) if isinstance(value, _Mark))
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _add(self, name: str) -> None:
        many = name.endswith("S")
        items = self._since_mark() if many else [self.stack.pop()]
        if name.startswith("SETITEM"):
            if not many:
                items.insert(0, self.stack.pop())
            assert type(self.stack[-1]) is dict, "it sets entries of what is no dictionary"
            self.stack[-1].update(_pairs(items))
        else:
            assert type(self.stack[-1]) is list, "it extends what is no list"
            self.stack[-1].extend(items)

    def _known(self, module: str, word: str) -> Name:
        is_number = module == "torch" and word in NUMBERS
        is_storage = module in ("torch", "torch.storage", "torch.cuda") and word in STORAGES
        known = (module, word) in _CALLS or (module, word) in self.records
        if not known and not is_number and not is_storage:
            raise CheckpointError(
                f"{self.path} holds {module}.{word}, and only tensors and dictionaries are read: nothing that a file names is imported "
                "or called. Save the state dict alone with the program that the file is from: torch.save(model.state_dict(), OUT)"
            )
        return Name(module, word)

    def _called(self, function: Any, given: Any) -> Any:
        assert isinstance(function, Name) and type(given) is tuple, "it calls what is no function"
        if (function.module, function.name) in self.records:
            return Record(function.name, given)
        if function.name == "_rebuild_from_type_v2":  # a tensor with attributes, which no merge needs
            return self._called(given[0], given[2])
        if function.name == "OrderedDict":
            return dict(given[0]) if given else {}
        if function.name in ("Size", "device"):
            return given[0] if given else ()
        if function.name.startswith("_rebuild_parameter"):
            assert isinstance(given[0], Strided), "a parameter is no tensor"
            return given[0]
        storage, offset, shape, stride = given[:4]
        if function.name == "_rebuild_tensor_v3":
            number = given[6]
            assert isinstance(number, Name) and number.name in NUMBERS, "a tensor has no dtype"
            storage = Storage(storage.key, NUMBERS[number.name], storage.numel)
        assert isinstance(storage, Storage), "a tensor has no storage"
        numbers = (offset, *shape, *stride)
        assert all(type(one) is int and 0 <= one < 2**62 for one in numbers), (
            "a tensor has an impossible place"
        )
        assert len(shape) == len(stride) <= 64, "a tensor has an impossible shape"
        return Strided(storage, offset, tuple(shape), tuple(stride))

    def _storage(self, given: Any) -> Storage:
        kind, storage, key, _, numel, *rest = given
        assert kind == "storage" and isinstance(storage, Name) and storage.name in STORAGES, (
            "a storage is of no known kind"
        )
        assert type(numel) is int and 0 <= numel < 2**62 and isinstance(key, str), (
            "a storage has an impossible size"
        )
        assert not any(rest), "a storage is a view of another, as torch wrote before 1.0"
        return Storage(key, STORAGES[storage.name], numel)


def _pairs(items: list[Any]) -> Mapping[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))
