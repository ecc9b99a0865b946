"""Reads the text of a PTX module: variables, kernels, statements with their operands resolved.

It follows the PTX ISA (docs.nvidia.com/cuda/parallel-thread-execution) as far as nvcc and inline
assembly use it: `.entry` functions without calls, registers in nested scopes, module variables with
initialisers, `.loc` of -lineinfo.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from .scalars import PtxError, dtype_of


@dataclass(frozen=True)
class Register:
    """A register; `name` is unique in its kernel, whatever scope declares it."""

    name: str
    type: str


@dataclass(frozen=True)
class Immediate:
    """A constant: an integer, or a number with a point (`is_float`, given by its value)."""

    value: int | float
    bits: int = 0  # width of a constant that was given by its bits: 32 (0f...) or 64 (0d...)

    def pattern(self, type_name: str) -> int:
        """Its bits as a constant of a type."""
        width = 8 * (dtype_of(type_name).itemsize if type_name != "pred" else 1)
        if self.bits or isinstance(self.value, int):
            value = int(self.value)
            if self.bits == 64 and width == 32:  # a double where a float is asked for
                value = _float_bits(struct.unpack("<d", struct.pack("<Q", value))[0], 32)
            return value & ((1 << width) - 1)
        return _float_bits(self.value, width)


@dataclass(frozen=True)
class Symbol:
    """The address of a variable or parameter, plus bytes."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    """What stands in brackets: a base and an offset in bytes."""

    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    """Operands in braces."""

    items: tuple[Register | Immediate, ...]


@dataclass(frozen=True)
class Pair:
    """`d|p`: two destinations."""

    first: Register
    second: Register


@dataclass(frozen=True)
class Not:
    """`!p`."""

    register: Register


Operand = Register | Immediate | Symbol | Address | Vector | Pair | Not


@dataclass(frozen=True)
class Statement:
    """An instruction. `source` is (file, line) of the CUDA source where -lineinfo gave it."""

    opcode: tuple[str, ...]  # split at the points: ("add", "s32")
    operands: tuple[Operand, ...]
    guard: Register | None
    guard_negated: bool
    text: str
    line: int  # of the PTX file, from 1
    source: tuple[str, int] | None
    index: int  # of the kernel's statements
    labels: tuple[str, ...] = ()  # targets of a branch

    def has(self, *words: str) -> bool:
        """Whether any of the words is among the opcode's parts."""
        return any(word in self.opcode for word in words)

    @property
    def type(self) -> str:
        """The last part of the opcode: the type, of most instructions."""
        return self.opcode[-1]

    def __str__(self) -> str:
        return f"line {self.line} `{self.text}`"


@dataclass(frozen=True)
class Variable:
    """A variable in memory. `relocations`: (offset in bytes, symbol) of 8-byte addresses in data.

    An array without a size (dynamic shared memory) has n_bytes None.
    """

    name: str
    space: str  # "global", "const", "shared", "local", "param"
    align: int
    n_bytes: int | None
    data: bytes | None = None
    relocations: tuple[tuple[int, str], ...] = ()


@dataclass
class Kernel:
    """An `.entry`. `labels` gives the index of the statement that a label stands before."""

    name: str
    params: list[Variable]
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    registers: dict[str, Register] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)  # shared and local
    max_threads: int = 1024

    def symbols(self) -> set[str]:
        """All names of variables that its statements use."""
        found: set[str] = set()
        for statement in self.statements:
            for operand in statement.operands:
                base = operand.base if isinstance(operand, Address) else operand
                if isinstance(base, Symbol):
                    found.add(base.name)
        return found


@dataclass
class Module:
    """A PTX file."""

    target: str
    kernels: dict[str, Kernel]
    variables: dict[str, Variable]  # of module scope


_NAME = r"[%$A-Za-z_][\w$%]*"
_SPACE = r"\.(global|const|shared|local|param)\b"


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
        PtxError: For text that is not PTX as nvcc writes it.
    """
    target = re.search(r"^\s*\.target\s+(\w+)", text, re.M)
    if target is None:
        raise PtxError("This is not a PTX module: it has no .target line.")
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    files = {n: path for n, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)}
    text = re.sub(r"^\s*\.(version|target|address_size|file)\b[^\n]*", "", text, flags=re.M)
    module = Module(target[1], {}, {})
    at = 0
    while match := re.compile(r"\s*([^;{]*?)\s*([;{])").match(text, at):
        head, at = match[1], match.end()
        begin = match.end(2) - 1
        if entry := re.search(rf"\.entry\s+({_NAME})", head):
            at = _closing(text, begin)
            kernel = Kernel(entry[1], _parameters(head))
            if bound := re.search(r"\.maxntid\s+([\d\s,]+)", head):
                kernel.max_threads = 1
                for n in bound[1].split(","):
                    kernel.max_threads *= int(n)
            _Body(kernel, text, begin + 1, at - 1, files).read()
            module.kernels[kernel.name] = kernel
        elif re.search(r"\.func\b", head) or head.startswith(".section"):
            at = _closing(text, begin) if match[2] == "{" else at
        elif re.search(_SPACE, head):
            if match[2] == "{":  # an initialiser
                at = text.index(";", _closing(text, begin)) + 1
                head = text[match.start(1) : at - 1]
            variable = _variable(head)
            module.variables[variable.name] = variable
        else:
            line = 1 + text.count("\n", 0, begin)
            raise PtxError(f"Line {line}: {head!r} is no declaration that this interpreter knows.")
    return module


def _closing(text: str, begin: int) -> int:
    """Where the brace that opens at `begin` has been closed."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, begin):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.end()
    raise PtxError("A brace is opened and never closed.")


def _parameters(head: str) -> list[Variable]:
    begin = head.find("(")
    return [
        _variable(part) for part in head[begin + 1 : head.rfind(")")].split(",") if part.strip()
    ]


def _variable(declaration: str) -> Variable:
    """`.visible .const .align 4 .b8 name[16] = {1, 2}`; one array dimension or none."""
    left, _, value = declaration.partition("=")
    space = re.search(_SPACE, left)
    types = re.findall(r"\.([busf]\d+|pred)\b", left)
    name = re.search(rf"({_NAME})\s*(?:\[\s*(\d*)\s*\])?\s*$", left)
    if space is None or not types or name is None:
        raise PtxError(f"{declaration.strip()!r} is no declaration that this interpreter knows.")
    item = dtype_of(types[0]).itemsize
    align = re.search(r"(?<!\.ptr )\.align\s+(\d+)", left)
    n_bytes = None if name[2] == "" else item * int(name[2] or 1)
    data: bytes | None = None
    relocations: tuple[tuple[int, str], ...] = ()
    if value.strip():
        if n_bytes is None:
            raise PtxError(f"{name[1]} has an initialiser but no size.")
        data, relocations = _initialiser(value, types[0], n_bytes)
    return Variable(name[1], space[1], int(align[1]) if align else item, n_bytes, data, relocations)


def _initialiser(
    value: str, type_name: str, n_bytes: int
) -> tuple[bytes, tuple[tuple[int, str], ...]]:
    item = dtype_of(type_name).itemsize
    data = bytearray(n_bytes)
    relocations = []
    words = [word.strip() for word in re.sub(r"[{}\n]", " ", value).split(",")]
    for i, word in enumerate(word for word in words if word):
        constant = _constant(word)
        if constant is not None:
            data[i * item : (i + 1) * item] = constant.pattern(type_name).to_bytes(item, "little")
        elif (named := re.fullmatch(rf"generic\(({_NAME})\)|({_NAME})", word)) and item == 8:
            relocations.append((i * item, named[1] or named[2]))
        else:
            raise PtxError(f"The initialiser {word!r} is not one that this interpreter knows.")
    return bytes(data), tuple(relocations)


def _float_bits(value: float, width: int) -> int:
    return int.from_bytes(struct.pack({16: "<e", 32: "<f", 64: "<d"}[width], value), "little")


def _constant(word: str) -> Immediate | None:
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", word):
        return Immediate(int(match[1], 16), 32)
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", word):
        return Immediate(int(match[1], 16), 64)
    if match := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)[uU]?", word):
        digits = match[2]
        octal = len(digits) > 1 and digits.isdigit() and digits[0] == "0"
        number = int(digits, 8 if octal else 0)
        return Immediate(-number if match[1] else number)
    if re.fullmatch(r"-?\d+\.\d*([eE][-+]?\d+)?", word):
        return Immediate(float(word))
    return None


class _Body:
    """Reads what stands between the braces of a kernel."""

    def __init__(
        self, kernel: Kernel, text: str, begin: int, end: int, files: dict[str, str]
    ) -> None:
        self.kernel, self.text, self.at, self.end, self.files = kernel, text, begin, end, files
        self.scopes: list[dict[str, Register]] = [{}]
        self.ranges: dict[str, str] = {}  # prefix -> type, of `.reg .b32 %r<9>`
        self.label_scopes: list[int] = [0]
        self.n_scopes = 0
        self.source: tuple[str, int] | None = None

    def read(self) -> None:
        line, seen = 1 + self.text.count("\n", 0, self.at), self.at
        while True:
            blank = re.compile(r"\s*").match(self.text, self.at)
            self.at = blank.end() if blank else self.at
            if self.at >= self.end:
                break
            line, seen = line + self.text.count("\n", seen, self.at), self.at
            self._item(line)
        for statement in self.kernel.statements:
            for label in statement.labels:
                if label not in self.kernel.labels:
                    raise PtxError(f"{self.kernel.name}, {statement}: no label {label}.")

    def _item(self, line: int) -> None:
        text, at = self.text, self.at
        if text[at] == "{":
            self.n_scopes += 1
            self.scopes.append({})
            self.label_scopes.append(self.n_scopes)
            self.at += 1
        elif text[at] == "}":
            self.scopes.pop()
            self.label_scopes.pop()
            self.at += 1
        elif text[at] == ";":
            self.at += 1
        elif loc := re.compile(r"\.loc\s+(\d+)\s+(\d+)[^\n;]*").match(text, at):
            self.source = (self.files.get(loc[1], "?"), int(loc[2]))
            self.at = loc.end()
        elif label := re.compile(rf"({_NAME})\s*:(?!:)").match(text, at):
            self.at = label.end()
            self._label(label[1])
        else:
            end = text.index(";", at)
            self.at = end + 1
            words = " ".join(text[at:end].split())
            if words.startswith("."):
                self._directive(words)
            else:
                self.kernel.statements.append(self._statement(words, line))

    def _label(self, name: str) -> None:
        table = re.compile(r"\s*\.branchtargets\s+([^;]*);").match(self.text, self.at)
        if table:
            targets = tuple(self._label_name(t.strip()) for t in table[1].split(","))
            self.kernel.branch_tables[self._label_name(name)] = targets
            self.at = table.end()
        else:
            self.kernel.labels[self._label_name(name)] = len(self.kernel.statements)

    def _label_name(self, name: str) -> str:
        # nvcc's own labels are unique; those of inline assembly belong to their scope.
        return name if name.startswith("$") else f"{name}@{self.label_scopes[-1]}"

    def _directive(self, words: str) -> None:
        if words.startswith(".reg"):
            match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", words)
            if match is None:
                raise PtxError(f"{self.kernel.name}: {words!r} declares no registers.")
            for name in match[2].split(","):
                if ranged := re.fullmatch(r"\s*(\S+?)\s*<\s*\d+\s*>\s*", name):
                    self.ranges[ranged[1]] = match[1]
                else:
                    unique = f"{name.strip()}@{self.label_scopes[-1]}"
                    self.scopes[-1][name.strip()] = Register(unique, match[1])
        elif re.match(_SPACE, words):
            self.kernel.variables.append(_variable(words))
        elif not words.startswith(".pragma"):
            raise PtxError(f"{self.kernel.name}: the directive {words!r} is not known.")

    def _register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope:
                found: Register | None = scope[name]
                break
        else:
            match = re.fullmatch(r"(.*?)(\d+)", name)
            prefix = match[1] if match else ""
            found = Register(name, self.ranges[prefix]) if prefix in self.ranges else None
        if found is not None:
            self.kernel.registers[found.name] = found
        return found

    def _statement(self, words: str, line: int) -> Statement:
        match = re.fullmatch(rf"(?:@(!?)\s*({_NAME})\s+)?([a-z][\w.:]*)\s*(.*)", words)
        if match is None:
            raise PtxError(f"{self.kernel.name}, line {line}: {words!r} is no instruction.")
        guard = self._register(match[2]) if match[2] else None
        if match[2] and guard is None:
            raise PtxError(f"{self.kernel.name}, line {line}: no register {match[2]}.")
        opcode = tuple(match[3].split("."))
        parts = _split(match[4])
        labels: tuple[str, ...] = ()
        if opcode[0] == "bra":
            labels, parts = (self._label_name(parts[0]),), []
        elif opcode[0] == "brx":
            table = self._label_name(parts[1])
            parts = parts[:1]
            if table not in self.kernel.branch_tables:
                raise PtxError(f"{self.kernel.name}, line {line}: no table {table} before it.")
            labels = self.kernel.branch_tables[table]
        operands = tuple(self._operand(part, line) for part in parts)
        index = len(self.kernel.statements)
        return Statement(
            opcode, operands, guard, match[1] == "!", words, line, self.source, index, labels
        )

    def _operand(self, word: str, line: int) -> Operand:
        if word.startswith("{"):
            found = [self._operand(part, line) for part in _split(word[1:-1])]
            scalars = tuple(item for item in found if isinstance(item, Register | Immediate))
            if len(scalars) == len(found):
                return Vector(scalars)
        if word.startswith("["):
            return self._address(word, line)
        if word.startswith("!"):
            inner = self._operand(word[1:].strip(), line)
            if isinstance(inner, Register):
                return Not(inner)
        if "|" in word:
            first, second = (self._operand(part.strip(), line) for part in word.split("|"))
            if isinstance(first, Register) and isinstance(second, Register):
                return Pair(first, second)
        constant = _constant(word)
        if constant is not None:
            return constant
        if match := re.fullmatch(rf"(-?)({_NAME}(?:\.[xyzw])?)\s*(?:([+-])\s*(\d+))?", word):
            if register := self._register(match[2]):
                return register
            if match[2] == "_":
                return Register("_", "sink")
            if match[2].startswith("%"):
                return Register(match[2], "special")
            offset = int(match[4] or 0)
            return Symbol(match[2], -offset if match[3] == "-" else offset)
        raise PtxError(f"{self.kernel.name}, line {line}: {word!r} is no operand.")

    def _address(self, word: str, line: int) -> Address:
        match = re.fullmatch(r"\[\s*(.*?)\s*(?:\+\s*(-?\w+))?\s*\]", word)
        if match is None:
            raise PtxError(f"{self.kernel.name}, line {line}: {word!r} is no address.")
        base = self._operand(match[1], line)
        if not isinstance(base, Register | Symbol | Immediate):
            raise PtxError(f"{self.kernel.name}, line {line}: {word!r} is no address.")
        return Address(base, int(match[2], 0) if match[2] else 0)


def _split(words: str) -> list[str]:
    """At the commas that stand in no braces or brackets."""
    parts, depth, current = [], 0, ""
    for letter in words:
        depth += letter in "{["
        depth -= letter in "}]"
        if letter == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    if current.strip():
        parts.append(current.strip())
    return parts
