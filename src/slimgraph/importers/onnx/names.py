"""Make names out of an untrusted file safe to show, and to stand in generated code."""

import unicodedata

_KEPT = frozenset("/:.-_ ")


def text(raw: str | bytes) -> str:
    """A string field of a proto; protobuf gives bytes where the file has what is not UTF-8."""
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw


def safe(raw: str | bytes) -> str:
    """The name with an underscore for each character but letters, digits, spaces and `/ : . - _`.

    Letters that Python takes for one another in identifiers become the same letter (NFKC).

    >>> safe("layer.0/conv;1")
    'layer.0/conv_1'
    """
    normal = unicodedata.normalize("NFKC", text(raw))
    return "".join(letter if letter.isalnum() or letter in _KEPT else "_" for letter in normal)


def shown(raw: str | bytes, limit: int = 100) -> str:
    """The name in quotes for a message, on one line and not endless."""
    name = safe(raw)
    return f"'{name}'" if len(name) <= limit else f"'{name[:limit]}…'"


def domain(raw: str | bytes) -> str:
    """The domain of an operator; the standard one has two names."""
    name = safe(raw)
    return "" if name == "ai.onnx" else name


class Names:
    """Safe names for the raw ones of a file, the same each time; two raw names never become one."""

    def __init__(self) -> None:
        self._given: dict[str | bytes, str] = {"": ""}
        self._taken: set[str] = {""}
        self._counts: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._taken

    def of(self, raw: str | bytes) -> str:
        """The safe name of a raw one; the empty name, by which ONNX leaves something out, stays empty."""
        if raw not in self._given:
            self._given[raw] = self.new(safe(raw))
        return self._given[raw]

    def new(self, wanted: str) -> str:
        """`wanted`, or the first of `wanted_1`, `wanted_2`, … that is free; it is taken from then on."""
        name = wanted = wanted or "_"
        while name in self._taken:
            self._counts[wanted] = count = self._counts.get(wanted, 0) + 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name
