"""Read messages in the wire format of protocol buffers."""

import struct
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

from slimgraph.errors import ModelImportError

# Paddle's two messages are few fields; reading them here is less than describing them to a protobuf runtime, and lets
# a damaged file say what is damaged.
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
_T = TypeVar("_T")


def _varint(data: memoryview, at: int, what: str) -> tuple[int, int]:
    """An unsigned number of up to 64 bits, and the place after it."""
    number = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise ModelImportError(f"{what} ends inside a number. The file is damaged or cut off.")
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80 and number < 2**64:
            return number, at
    raise ModelImportError(f"{what} has a number of more than 64 bits. The file is damaged.")


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


class Message:
    """The fields of one message, by their numbers.

    A field that may occur once gives its default where it is left out, and an error where it occurs twice. The data is
    not copied: texts and numbers are read when they are asked for.
    """

    def __init__(self, data: memoryview, what: str) -> None:
        self._what = what
        self._fields: defaultdict[int, list[tuple[int, int | memoryview]]] = defaultdict(list)
        at = 0
        while at < len(data):
            tag, at = _varint(data, at, what)
            field, kind = tag >> 3, tag & 7
            if kind == _VARINT:
                number, at = _varint(data, at, what)
                self._fields[field].append((kind, number))
                continue
            if kind == _BYTES:
                length, at = _varint(data, at, what)
            elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
                length = 8 if kind == _EIGHT_BYTES else 4
            else:
                raise ModelImportError(f"{what} has a field of the unknown kind {kind}. The file is damaged.")
            if length > len(data) - at:
                raise ModelImportError(f"{what} has a field that is longer than the rest. It is damaged or cut off.")
            self._fields[field].append((kind, data[at : at + length]))
            at += length

    def integers(self, field: int) -> tuple[int, ...]:
        """A repeated integer, one by one or packed."""
        found: list[int] = []
        for kind, item in self._fields.get(field, ()):
            if isinstance(item, int):
                found.append(_signed(item))
            elif kind == _BYTES:
                at = 0
                while at < len(item):
                    number, at = _varint(item, at, self._what)
                    found.append(_signed(number))
            else:
                raise self._wrong(field, "an integer")
        return tuple(found)

    def flags(self, field: int) -> tuple[bool, ...]:
        """A repeated truth value."""
        return tuple(number != 0 for number in self.integers(field))

    def floats(self, field: int) -> tuple[float, ...]:
        """A repeated number of single precision, one by one or packed."""
        return self._reals(field, _FOUR_BYTES, "f")

    def doubles(self, field: int) -> tuple[float, ...]:
        """A repeated number of double precision, one by one or packed."""
        return self._reals(field, _EIGHT_BYTES, "d")

    def _reals(self, field: int, size_kind: int, code: str) -> tuple[float, ...]:
        found: list[float] = []
        size = struct.calcsize(f"<{code}")
        for kind, item in self._fields.get(field, ()):
            if isinstance(item, int) or kind not in (size_kind, _BYTES) or len(item) % size:
                raise self._wrong(field, f"a number of {size} bytes")
            found.extend(struct.unpack(f"<{len(item) // size}{code}", item))
        return tuple(found)

    def data(self, field: int) -> tuple[memoryview, ...]:
        """A repeated string of bytes, which may be a message."""
        found: list[memoryview] = []
        for kind, item in self._fields.get(field, ()):
            if isinstance(item, int) or kind != _BYTES:
                raise self._wrong(field, "a string of bytes")
            found.append(item)
        return tuple(found)

    def texts(self, field: int) -> tuple[str, ...]:
        """A repeated text."""
        try:
            return tuple(str(item, "utf-8") for item in self.data(field))
        except UnicodeDecodeError as error:
            raise self._wrong(field, "text in UTF-8") from error

    def messages(self, field: int, what: str) -> "list[Message]":
        """A repeated message; `what` names it in errors."""
        return [Message(item, what) for item in self.data(field)]

    def message(self, field: int, what: str) -> "Message":
        """A message that occurs once; one that is left out reads like an empty one."""
        return Message(self.one(self.data, field, memoryview(b"")), what)

    def one(self, read: Callable[[int], tuple[_T, ...]], field: int, default: _T | None = None) -> _T:
        """The only occurrence of a field, by one of the methods above: `message.one(message.integers, 3)`."""
        found = read(field)
        if len(found) > 1 or (not found and default is None):
            raise self._wrong(field, "one value, but it has several" if found else "one value, but it has none")
        return found[0] if found else default  # type: ignore[return-value]  # None was refused above

    def _wrong(self, field: int, expected: str) -> ModelImportError:
        return ModelImportError(f"{self._what} needs in its field {field} {expected}. The file is damaged.")
