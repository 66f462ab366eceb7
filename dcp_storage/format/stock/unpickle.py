"""Reads the pickle of a stock manifest as plain data: every global has a stand-in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dcp_storage.errors import ManifestCorrupt, UnsupportedFormat
from dcp_storage.format.pickles import Damaged, Machine, Refused


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


_PROTOCOL = b"\x80"
"""The first byte of every pickle since protocol 2."""

Globals = Mapping[tuple[str, str], object]


def read_pickle(data: bytes, known: Globals, *, where: str) -> object:
    """Return the data in a pickle, with the values of `known` for its globals and a `Record` for each instance.

    Raises:
        UnsupportedFormat: It asks for an unknown global, or has an instruction that plain data does not need.
        ManifestCorrupt: It is truncated or not a pickle.
    """
    machine = _DataMachine(data, known)
    try:
        return machine.run()
    except Refused as refused:
        says = f"{where} is a pickle that {refused}. Nothing was executed; the checkpoint cannot be loaded"
        raise UnsupportedFormat(says, url=where) from None
    except Damaged as fault:
        foreign = "" if data.startswith(_PROTOCOL) else "; it does not begin like a manifest of this package or of DCP"
        raise ManifestCorrupt(f"{where} is damaged at byte {machine.pos}: {fault}{foreign}", url=where) from None


class _DataMachine(Machine):
    """Executes nothing, hashes only strings and records."""

    refused = {  # noqa: RUF012
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

    def __init__(self, data: bytes, known: Globals) -> None:
        super().__init__(data)
        self._known = known

    def find(self, module: str, name: str) -> object:
        if (module, name) not in self._known:
            raise Refused(f"asks for {module}.{name}, which no stock manifest needs")
        return self._known[module, name]

    def call(self, function: object, arguments: tuple[object, ...]) -> object:
        if not isinstance(function, Function):
            raise Refused(
                f"calls {function.name if isinstance(function, Class) else 'something that is not a function'}"
            )
        return function.call(arguments)

    def make(self, cls: object, arguments: tuple[object, ...], keywords: dict[str, object]) -> object:
        if not isinstance(cls, Class):
            raise Refused("makes an instance of something that is not a class")
        if arguments or keywords:
            raise Refused(f"makes a {cls.name} with arguments, which no stock manifest needs")
        return Record(cls.name)

    def set_state(self, instance: object, state: object) -> None:
        if type(instance) is not Record or instance.state is not None:
            raise Refused("changes the state of something that is not a new instance")
        instance.state = state

    def set_items(self, target: object, items: list[tuple[object, object]]) -> None:
        if type(target) is not dict:
            raise Damaged("a key for something that is not a dict")
        if any(type(key) is not str and type(key) is not Record for key, _ in items):
            raise Damaged("a key that is not a name")
        target.update(items)
