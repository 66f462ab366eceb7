"""A pickle machine that executes nothing by itself.

A pickle is a program. This machine interprets its instructions, builds plain data, and leaves the meaning of globals,
calls and instances to subclasses. It imports nothing, looks up no attribute, trusts no length and does not recurse, so
the worst that a pickle can do is to use memory in proportion to its size.
"""

import pickle
import re
from collections.abc import Callable
from typing import ClassVar


class Refused(Exception):
    """The pickle asks for something that is not allowed; the message completes "the pickle ..."."""


class Damaged(Exception):
    """The bytes are not a valid pickle."""


class Machine:
    """The stack, the memo and the position in a pickle."""

    opcodes: ClassVar[dict[int, Callable[..., object]]]
    refused: ClassVar[dict[int, str]] = {}
    """Instructions, by code, that this kind of data does not need."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pos = 0
        self.protocol = 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        """Return the object that the pickle describes.

        Raises:
            Refused: It asks for something that is not allowed.
            Damaged: It is truncated or not a pickle.
        """
        try:
            return self._run()
        except (IndexError, KeyError, ValueError) as error:
            raise Damaged("not a valid pickle") from error

    def _run(self) -> object:
        data, opcodes = self.data, self.opcodes
        while self.pos < len(data):
            code = data[self.pos]
            self.pos += 1
            if code == _STOP:
                return self._stop()
            opcode = opcodes.get(code)
            if opcode is None:
                self._unknown(code)
            else:
                opcode(self)
        raise Damaged("it ends early")

    def _stop(self) -> object:
        if len(self.stack) != 1 or self.marks or self.pos != len(self.data):
            raise Damaged("it stops too early")
        return self.stack.pop()

    def _unknown(self, code: int) -> None:
        if code in self.refused:
            raise Refused(f"contains the instruction {self.refused[code]}, which plain data does not need")
        raise Damaged(f"unknown instruction {code:#04x}")

    def find(self, module: str, name: str) -> object:
        """Return the stand-in for a global.

        Raises:
            Refused: It is not allowed.
        """
        raise NotImplementedError

    def call(self, function: object, arguments: tuple[object, ...]) -> object:
        """Return the result of a call."""
        raise NotImplementedError

    def make(self, cls: object, arguments: tuple[object, ...], keywords: dict[str, object]) -> object:
        """Return a new instance."""
        raise NotImplementedError

    def set_state(self, instance: object, state: object) -> None:
        """Give a new instance its state."""
        raise NotImplementedError

    def extend(self, target: object, values: list[object]) -> None:  # noqa: ARG002  # subclasses use it
        """Append to an object that is not exactly a list."""
        raise Damaged("an element for something that is not a list")

    def set_items(self, target: object, items: list[tuple[object, object]]) -> None:
        """Set items of a dict, and check that the keys are safe to hash."""
        raise NotImplementedError

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        start, self.pos = self.pos, self.pos + count
        if self.pos > len(self.data):
            raise Damaged("it ends early")
        return self.data[start : self.pos]

    def view(self, count: int) -> memoryview:
        """Return the next bytes without copying them."""
        start, self.pos = self.pos, self.pos + count
        if self.pos > len(self.data):
            raise Damaged("it ends early")
        return memoryview(self.data)[start : self.pos]

    def number(self, width: int) -> int:
        """Return the next unsigned number."""
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        """Return the text up to the end of the line."""
        return self.take(self.data.index(b"\n", self.pos) + 1 - self.pos)[:-1].decode()

    def push(self, value: object) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def proto(self) -> None:
        """Check the protocol."""
        self.protocol = self.number(1)
        if self.protocol > _NEWEST_PROTOCOL:
            raise Refused(f"is of the unknown protocol {self.protocol}")

    def integer(self, width: int) -> None:
        """Push a signed number."""
        self.stack.append(int.from_bytes(self.take(width), "little", signed=True))

    def text(self, width: int) -> None:
        """Push a string; a lone surrogate is not damage, since pickle writes any `str`."""
        count = self.number(width)
        text = self.take(count) if count < _LONG_TEXT else self.view(count)
        self.stack.append(str(text, "utf-8", "surrogatepass"))

    def mark(self) -> None:
        """Mark the stack's height, and push a run of numbers at once: there may be millions."""
        self.marks.append(len(self.stack))
        run = _NUMBERS.match(self.data, self.pos)
        if run:
            self.pos = run.end()
            self.stack += pickle.loads(b"(" + run[0] + b"t.")  # noqa: S301  # only numbers

    def since_mark(self) -> list[object]:
        """Pop down to the last mark."""
        start = self.marks.pop()
        if start > len(self.stack):
            raise Damaged("a mark above the stack")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def pop_items(self, count: int) -> list[object]:
        """Pop some values."""
        if count > len(self.stack):
            raise Damaged("an empty stack")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def pop(self) -> None:
        """Drop the top of the stack, which may be a mark."""
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def tuple_of(self, values: list[object]) -> None:
        """Push a tuple."""
        self.stack.append(tuple(values))

    def append(self, values: list[object]) -> None:
        """Append to the list on the stack."""
        target = self.stack[-1]
        if type(target) is list:
            target.extend(values)
        else:
            self.extend(target, values)

    def update(self, values: list[object]) -> None:
        """Set items of the dict on the stack."""
        self.set_items(self.stack[-1], list(zip(values[::2], values[1::2], strict=True)))

    def put(self, key: int) -> None:
        """Remember the top of the stack."""
        self.memo[key] = self.stack[-1]

    def get(self, key: int) -> None:
        """Push what was remembered."""
        self.stack.append(self.memo[key])

    def name(self, module: object, name: object) -> None:
        """Push a global."""
        if type(module) is not str or type(name) is not str:
            raise Damaged("a global without a name")
        self.stack.append(self.find(module, name))

    def reduce(self) -> None:
        """Call a function."""
        function, arguments = self.pop_items(2)
        if type(arguments) is not tuple:
            raise Damaged("a call without arguments")
        self.stack.append(self.call(function, arguments))

    def new(self) -> None:
        """Make an instance."""
        cls, arguments = self.pop_items(2)
        if type(arguments) is not tuple:
            raise Damaged("an instance without arguments")
        self.stack.append(self.make(cls, arguments, {}))

    def build(self) -> None:
        """Give the instance on the stack its state."""
        state = self.stack.pop()
        self.set_state(self.stack[-1], state)


_STOP = ord(".")
_LONG_TEXT = 4096
_NEWEST_PROTOCOL = 5
_LONG = rb"\x8a(?:\x01.|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8})"
_NUMBERS = re.compile(rb"(?:[N\x88\x89]|K.|M..|J....|G.{8}|" + _LONG + rb"){16,}+", re.DOTALL)
"""A run of `None`, booleans, integers and floats."""

Machine.opcodes = {
    0x80: Machine.proto,
    0x95: lambda m: m.take(8),  # a frame: a hint for readers of files
    ord("("): Machine.mark,
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("K"): lambda m: m.push(m.number(1)),
    ord("M"): lambda m: m.push(m.number(2)),
    ord("J"): lambda m: m.integer(4),
    0x8A: lambda m: m.integer(m.number(1)),
    0x8C: lambda m: m.text(1),
    ord("X"): lambda m: m.text(4),
    0x8D: lambda m: m.text(8),
    ord("}"): lambda m: m.push({}),
    ord("]"): lambda m: m.push([]),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.tuple_of(m.since_mark()),
    0x85: lambda m: m.tuple_of(m.pop_items(1)),
    0x86: lambda m: m.tuple_of(m.pop_items(2)),
    0x87: lambda m: m.tuple_of(m.pop_items(3)),
    ord("a"): lambda m: m.append(m.pop_items(1)),
    ord("e"): lambda m: m.append(m.since_mark()),
    ord("s"): lambda m: m.update(m.pop_items(2)),
    ord("u"): lambda m: m.update(m.since_mark()),
    0x94: lambda m: m.put(len(m.memo)),
    ord("q"): lambda m: m.put(m.number(1)),
    ord("r"): lambda m: m.put(m.number(4)),
    ord("h"): lambda m: m.get(m.number(1)),
    ord("j"): lambda m: m.get(m.number(4)),
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: lambda m: m.name(*m.pop_items(2)),
    ord("R"): Machine.reduce,
    0x81: Machine.new,
    ord("b"): Machine.build,
}
