"""A reader of pickles that holds data and executes none of it.

A pickle is a program. This machine knows only the instructions that build plain data, and gives globals from the
caller's table of stand-ins: it imports nothing, looks up no attribute, hashes only strings and records, takes no
length on trust and does not recurse, so that no pickle can do more than to cost memory in proportion to its size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dcp_storage.errors import ManifestCorrupt, UnsupportedFormat


class Refused(Exception):
    """The pickle asks for something that data does not need; the message completes "the pickle ..."."""


@dataclass(frozen=True, eq=False)
class Class:
    """Stands for a class whose instances become `Record`s."""

    name: str


@dataclass(frozen=True, eq=False)
class Function:
    """Stands for a callable: `call` maps its arguments to plain data, or raises `Refused`."""

    name: str
    call: Callable[[tuple[object, ...]], object]


@dataclass(slots=True, eq=False)
class Record:
    """An instance of a class that was not instantiated: the class's name and the state as pickled."""

    name: str
    state: object = None


Globals = Mapping[tuple[str, str], object]


def read_pickle(data: bytes, known: Globals, *, where: str) -> object:
    """Return the data in a pickle, with the values of `known` for its globals and a `Record` for each instance.

    Raises:
        UnsupportedFormat: It asks for a global that is not known, or for an instruction that data does not need.
        ManifestCorrupt: It is truncated or no pickle.
    """
    machine = _Machine(data, known)
    try:
        return machine.run()
    except Refused as refused:
        says = f"{where} is a pickle that {refused}. Nothing was executed; the checkpoint cannot be loaded"
        raise UnsupportedFormat(says, url=where) from None
    except (_Damage, IndexError, KeyError, ValueError) as fault:
        detail = fault if isinstance(fault, _Damage) else "no pickle holds this"
        raise ManifestCorrupt(f"{where} is damaged at byte {machine.pos}: {detail}", url=where) from None


class _Damage(Exception):
    """Bytes that no pickler writes."""


class _Machine:
    """The stack, the memo and the place in the pickle."""

    def __init__(self, data: bytes, known: Globals) -> None:
        self.data = data
        self.known = known
        self.pos = 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        data, opcodes = self.data, _OPCODES
        while self.pos < len(data):
            code = data[self.pos]
            self.pos += 1
            if code == _STOP:
                return self.stop()
            opcode = opcodes.get(code)
            if opcode is None:
                self.unknown(code)
            else:
                opcode(self)
        raise _Damage("it ends early")

    def stop(self) -> object:
        if len(self.stack) != 1 or self.marks or self.pos != len(self.data):
            raise _Damage("its end comes too early")
        return self.stack.pop()

    def unknown(self, code: int) -> None:
        if code in _REFUSED:
            raise Refused(f"holds the instruction {_REFUSED[code]}, which data does not need")
        raise _Damage(f"unknown instruction {code:#04x}")

    def take(self, count: int) -> bytes:
        start, self.pos = self.pos, self.pos + count
        if self.pos > len(self.data):
            raise _Damage("it ends early")
        return self.data[start : self.pos]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        return self.take(self.data.index(b"\n", self.pos) + 1 - self.pos)[:-1].decode()

    def push(self, value: object) -> None:
        self.stack.append(value)

    def proto(self) -> None:
        if (protocol := self.number(1)) > _NEWEST_PROTOCOL:
            raise Refused(f"is of the unknown protocol {protocol}")

    def integer(self, width: int) -> None:
        self.stack.append(int.from_bytes(self.take(width), "little", signed=True))

    def text(self, width: int) -> None:
        # Half a surrogate pair is not damage: pickle writes any str.
        self.stack.append(self.take(self.number(width)).decode(errors="surrogatepass"))

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def since_mark(self) -> list[object]:
        start = self.marks.pop()
        if start > len(self.stack):
            raise _Damage("a mark above the stack")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def tuple_of(self, count: int) -> None:
        self.stack.append(tuple(self.pop_items(count)))

    def append(self, values: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise _Damage("an element for what is no list")
        target.extend(values)

    def set_items(self, values: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise _Damage("a key for what is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) is not str and type(key) is not Record:
                raise _Damage("a key that is no name")
            target[key] = value

    def pop_items(self, count: int) -> list[object]:
        if count > len(self.stack):
            raise _Damage("an empty stack")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def get(self, key: int) -> None:
        self.stack.append(self.memo[key])

    def find(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise _Damage("a global without a name")
        if (module, name) not in self.known:
            raise Refused(f"asks for {module}.{name}, which no stock manifest needs")
        self.stack.append(self.known[module, name])

    def reduce(self) -> None:
        function, arguments = self.pop_items(2)
        if not isinstance(function, Function):
            raise Refused(f"calls {function.name if isinstance(function, Class) else 'what is no function'}")
        if type(arguments) is not tuple:
            raise _Damage("a call without arguments")
        self.stack.append(function.call(arguments))

    def new(self) -> None:
        cls, arguments = self.pop_items(2)
        if not isinstance(cls, Class):
            raise Refused("makes an instance of what is no class")
        if arguments != ():
            raise Refused(f"makes a {cls.name} with arguments, which no stock manifest needs")
        self.stack.append(Record(cls.name))

    def build(self) -> None:
        record, state = self.pop_items(2)
        if type(record) is not Record or record.state is not None:
            raise Refused("changes the state of what is no new instance")
        record.state = state
        self.stack.append(record)


_STOP = ord(".")
_NEWEST_PROTOCOL = 5

_OPCODES: dict[int, Callable[[_Machine], object]] = {
    0x80: _Machine.proto,
    0x95: lambda m: m.take(8),  # a frame: a hint for readers of files
    ord("("): _Machine.mark,
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
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("a"): lambda m: m.append(m.pop_items(1)),
    ord("e"): lambda m: m.append(m.since_mark()),
    ord("s"): lambda m: m.set_items(m.pop_items(2)),
    ord("u"): lambda m: m.set_items(m.since_mark()),
    0x94: lambda m: m.put(len(m.memo)),
    ord("q"): lambda m: m.put(m.number(1)),
    ord("r"): lambda m: m.put(m.number(4)),
    ord("h"): lambda m: m.get(m.number(1)),
    ord("j"): lambda m: m.get(m.number(4)),
    ord("c"): lambda m: m.find(m.line(), m.line()),
    0x93: lambda m: m.find(*m.pop_items(2)),
    ord("R"): _Machine.reduce,
    0x81: _Machine.new,
    ord("b"): _Machine.build,
}

_REFUSED = {
    ord("P"): "PERSID",
    ord("Q"): "BINPERSID",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    ord("i"): "INST",
    ord("o"): "OBJ",
    0x92: "NEWOBJ_EX",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
    ord("B"): "BINBYTES",
    ord("C"): "SHORT_BINBYTES",
    0x8E: "BINBYTES8",
    0x96: "BYTEARRAY8",
    0x8B: "LONG4",
    0x8F: "EMPTY_SET",
    0x90: "ADDITEMS",
    0x91: "FROZENSET",
}
