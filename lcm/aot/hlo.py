"""What an optimised TPU program says of itself: cycles, traffic and collectives, loops applied."""

import re
from collections.abc import Iterator
from typing import NamedTuple

_WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "token": 0}
_ARRAY = re.compile(r"\b(pred|token|bf16|[csuf]\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)")
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
# What moves nothing: names for what is there, or what counts within.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional"}
_FREE |= {"call", "after-all", "partition-id", "async-done", "async-start", "async-update"}


class Op(NamedTuple):
    """One line: `name = shape kind(operands), attributes`."""

    name: str
    shape: str
    kind: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of what it reads, those before the closing parenthesis."""
        return re.findall(r"%([\w.\-]+)", _closed(self.rest))


class Collective(NamedTuple):
    """How often a kind of collective runs, and the bytes that a device has of their results."""

    count: int
    bytes: int


class Totals(NamedTuple):
    """Of one device and one run of the program.

    cycles: XLA's own estimates; it gives none for Pallas kernels.
    accessed: bytes of memory that are read and written, each operand once an operation.
    collectives: by kind.
    """

    cycles: int
    accessed: int
    collectives: dict[str, Collective]

    @property
    def sent(self) -> int:
        return sum(each.bytes for each in self.collectives.values())

    def __add__(self, other: "Totals") -> "Totals":  # type: ignore[override]
        both = dict(self.collectives)
        for kind, (count, size) in other.collectives.items():
            had = both.get(kind, Collective(0, 0))
            both[kind] = Collective(had.count + count, had.bytes + size)
        return Totals(self.cycles + other.cycles, self.accessed + other.accessed, both)

    def times(self, count: int) -> "Totals":
        each = {k: Collective(count * n, count * size) for k, (n, size) in self.collectives.items()}
        return Totals(count * self.cycles, count * self.accessed, each)


NOTHING = Totals(0, 0, {})


class Module:
    """A program's text as computations by name."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Op]] = {}
        self.entry, name = "", ""
        for line in text.splitlines():
            if head := _HEAD.match(line):
                name = head.group(2)
                self.computations[name] = []
                self.entry = name if head.group(1) else self.entry
            elif name and (found := _LINE.match(line)):
                root, own, shape, kind, rest = found.groups()
                self.computations[name].append(Op(own, shape, kind, rest, bool(root)))
        self._known: dict[str, Totals] = {}

    def ops(self) -> Iterator[Op]:
        """All lines of all computations."""
        for ops in self.computations.values():
            yield from ops

    def totals(self) -> Totals:
        """Those of the whole program."""
        return self._totals(self.entry)

    def _totals(self, name: str) -> Totals:
        if name not in self._known:
            shapes = {op.name: op.shape for op in self.computations[name]}
            total = NOTHING
            for op in self.computations[name]:
                total += self._own(op, shapes) + self._within(op)
            self._known[name] = total
        return self._known[name]

    def _within(self, op: Op) -> Totals:
        """Of what an operation runs; a fusion has its own estimate."""
        called = _CALLED.findall(op.rest)
        if op.kind == "while":
            body = re.search(r"body=%?([\w.\-]+)", op.rest).group(1)
            return self._totals(body).times(self._trips(op))
        if op.kind == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
            called = re.findall(r"[\w.\-]+", listed.group(1).replace("%", "")) if listed else []
            called += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", op.rest)
            return max((self._totals(c) for c in called), key=lambda t: t.cycles, default=NOTHING)
        if op.kind in ("call", "async-start"):
            return self._totals(called[0]) if called else NOTHING
        return NOTHING

    def _trips(self, op: Op) -> int:
        """The constant that a scan counts to, in the condition of its loop; 1 of another loop."""
        condition = re.search(r"condition=%?([\w.\-]+)", op.rest).group(1)
        limits = [
            int(found.group(1))
            for each in self.computations[condition]
            if each.kind == "constant" and (found := re.match(r"(\d+)\)", each.rest))
        ]
        return max(limits, default=1)

    def _own(self, op: Op, shapes: dict[str, str]) -> Totals:
        cycles = re.search(r'estimated_cycles":"(\d+)"', op.rest)
        base = op.kind.removesuffix("-start")
        collectives = self._started(op)
        if base in COLLECTIVES:
            collectives = {base: Collective(1, _result(op, base))}
        free = op.kind in _FREE or op.kind.endswith("-done")
        accessed = 0 if free else self._accessed(op, shapes)
        return Totals(int(cycles.group(1)) if cycles else 0, accessed, collectives)

    def _started(self, op: Op) -> dict[str, Collective]:
        """Of a fusion that starts a collective, which goes on within those that follow it."""
        fused = _CALLED.search(op.rest) if op.kind == "fusion" else None
        inside = self.computations.get(fused.group(1), []) if fused else []
        if not any('target="AsyncCollectiveStart"' in each.rest for each in inside):
            return {}
        return {
            each.kind: Collective(1, _result(each, each.kind))
            for each in inside
            if each.kind in COLLECTIVES
        }

    def _accessed(self, op: Op, shapes: dict[str, str]) -> int:
        fused = _CALLED.search(op.rest) if op.kind == "fusion" else None
        if fused is None or fused.group(1) not in self.computations:
            if op.kind == "dynamic-slice":
                return 2 * size(op.shape)
            if op.kind == "dynamic-update-slice":
                return 2 * size(shapes.get(op.operands[1], ""))
            return size(op.shape) + sum(size(shapes.get(name, "")) for name in op.operands)
        inside = self.computations[fused.group(1)]
        own = {each.name: each for each in inside}
        parameters = [each for each in inside if each.kind == "parameter"]
        read = 0
        for parameter in parameters:
            number = int(re.match(r"(\d+)\)", parameter.rest).group(1))
            if number < len(op.operands) and not size(shapes.get(op.operands[number], "")):
                continue  # it lies in the memory of the core
            read += self._read(parameter, inside)
        root = next((each for each in inside if each.root), None)
        if root is not None and root.kind == "dynamic-update-slice":
            return read + size(own[root.operands[1]].shape)
        return read + size(op.shape)

    @staticmethod
    def _read(parameter: Op, inside: list[Op]) -> int:
        """Bytes a fusion reads of one operand: of what it only cuts from, the pieces."""
        users = [each for each in inside if parameter.name in each.operands]
        pieces = 0
        for user in users:
            cut = user.operands[0] == parameter.name
            if user.kind == "dynamic-slice" and cut:
                pieces += size(user.shape)
            elif user.kind == "dynamic-update-slice" and cut:
                continue  # written in place
            else:
                return size(parameter.shape)
        return pieces


def size(shape: str) -> int:
    """Bytes of a shape's arrays that lie in the memory of the chip, `S(1)` being the core's."""
    return sum(
        count * width for count, width, layout in _arrays(shape) if "S(1)" not in (layout or "")
    )


def dimensions(shape: str) -> list[tuple[int, ...]]:
    """The axes of each array of a shape."""
    return [tuple(map(int, filter(None, dims.split(",")))) for _, dims, _ in _ARRAY.findall(shape)]


def _arrays(shape: str) -> Iterator[tuple[int, float, str]]:
    for dtype, dims, layout in _ARRAY.findall(shape):
        count = 1
        for each in filter(None, dims.split(",")):
            count *= int(each)
        bits = re.match(r"[csuf](\d+)", dtype)
        yield count, _WIDTHS.get(dtype, int(bits.group(1)) // 8 if bits else 0), layout


def _result(op: Op, base: str) -> int:
    """Bytes of a collective's results; one that is started names its operands before them."""
    arrays = [count * width for count, width, _ in _arrays(op.shape)]
    if not op.kind.endswith("-start"):
        return int(sum(arrays))
    data = [each for each in arrays if each > 4]  # flags and counters aside
    if base == "all-reduce":
        return int(sum(data))
    return int(sum(data[len(data) // 2 :]))


def _closed(text: str) -> str:
    """Up to the parenthesis that closes the one before it."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:i]
    return text
