"""A pickle read as data: an interpreter of its opcodes that can call nothing but stand-ins.

A pickle is a program for a stack machine (A. Pitrou, PEP 574, 2018, peps.python.org/pep-0574;
`pickletools` of the standard library describes each opcode). Python's own machine imports any
global that the program names and calls it. Here a global is looked up in a table, by its module
and name as a pair, and what the table lacks is refused before anything happens; REDUCE and NEWOBJ
call the stand-ins of that table and nothing else, BUILD hands its state to a stand-in made by one
of them. No attribute is looked up or set, nothing is imported.

`torch.load(weights_only=True)` is such a machine too, yet it admits calls that take any amount of
memory (`bytearray(1 << 40)`, `torch.FloatTensor(1 << 40)`), no pickles of protocol 4, as EDM
writes them, and its table is global to the process; so this one reads all formats.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..files import CheckpointError
from ..unrolled import LIMIT, unrolled
from .bytes_of_file import Window

MAX_STEPS = 1_000_000  # the largest public checkpoints take some 10^5
IN_MEMORY = 1 << 16  # longer byte strings stay in the file until a tensor wants them


@dataclass(frozen=True)
class Global:
    """What a name in a pickle stands for: `make(*args)` in place of a call or a new object."""

    name: str
    make: Callable[..., Any]


class Unbuilt:
    """A stand-in that BUILD turns into another object, `built(state)`, in the memo too."""

    def __init__(self) -> None:
        self.memoised: list[int] = []

    def built(self, state: Any) -> Any:
        """The object that the state makes of this one."""
        raise NotImplementedError


class Stateful:
    """A stand-in that BUILD gives its state, once."""

    def take(self, state: Any) -> None:
        """Keep the state; nothing is called and no attribute set by name."""
        raise NotImplementedError


Table = Mapping[tuple[str, str], Any]  # a Global, or a value as it is, such as a dtype


def unpickle(source: Window, table: Table, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The object that the pickle at the start of `source` describes, made of stand-ins.

    Args:
        source: the bytes; left behind the pickle's last one.
        table: what each global, `(module, name)`, stands for.
        persistent: the object behind a persistent id; without it such ids are refused.

    Raises:
        CheckpointError: for a global that is not in the table, and for damaged pickles.
    """
    return _Machine(source, table, persistent).run()


def bounded(content: Any) -> Any:
    """The content as it is, if whoever prints or walks it comes to an end.

    Raises:
        CheckpointError: if its parts are repeated without measure, or contain themselves.
    """
    if unrolled(content) > LIMIT:
        raise CheckpointError(
            "its pickle nests its parts without end, or repeats them without measure"
        )
    return content


_NUMBERS = {
    pickle.BININT: "<i", pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BINFLOAT: ">d"
}  # fmt: skip
_TEXTS = {
    pickle.SHORT_BINUNICODE: "<B", pickle.BINUNICODE: "<I", pickle.BINUNICODE8: "<Q",
    pickle.SHORT_BINSTRING: "<B", pickle.BINSTRING: "<i",
}  # fmt: skip
_BYTES = {
    pickle.SHORT_BINBYTES: "<B", pickle.BINBYTES: "<I", pickle.BINBYTES8: "<Q",
    pickle.BYTEARRAY8: "<Q",
}  # fmt: skip
_VALUES = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, b")": ()}
_EMPTY: dict[bytes, type] = {
    pickle.EMPTY_LIST: list, pickle.EMPTY_DICT: dict, pickle.EMPTY_SET: set
}  # fmt: skip
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_STORE = {pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I"}
_RECALL = {pickle.BINGET: "<B", pickle.LONG_BINGET: "<I"}
_KEYS = (str, int, float, bool, bytes, type(None), torch.dtype)


class _Machine:
    def __init__(
        self, source: Window, table: Table, persistent: Callable[[Any], Any] | None
    ) -> None:
        self.source = source
        self.table = table
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MAX_STEPS):
            code = self.source.read(1)
            if code == pickle.STOP:
                if len(self.stack) != 1 or self.marked:
                    raise CheckpointError("it is damaged: its pickle ends with objects left over")
                return self.stack[0]
            self._step(code)
        raise CheckpointError(
            f"its pickle takes more than {MAX_STEPS} steps, as no checkpoint does"
        )

    def _step(self, code: bytes) -> None:
        push = self.stack.append
        if code in _RECALL:
            push(self.memo[self._number(_RECALL[code])])
        elif code in _STORE:
            self._memoise(self._number(_STORE[code]))
        elif code == pickle.MEMOIZE:
            self._memoise(len(self.memo))
        elif code in _NUMBERS:
            push(self._number(_NUMBERS[code]))
        elif code in _TEXTS:
            push(self.source.read(self._number(_TEXTS[code])).decode("utf-8", "surrogatepass"))
        elif code in _BYTES:
            n = self._number(_BYTES[code])
            push(self.source.read(n) if n <= IN_MEMORY else self.source.part(n))
        elif code == pickle.LONG1:
            push(int.from_bytes(self.source.read(self._number("<B")), "little", signed=True))
        elif code in _VALUES:
            push(_VALUES[code])
        elif code in _EMPTY:
            push(_EMPTY[code]())
        elif code == pickle.MARK:
            self.marked.append(self.stack)
            self.stack = []
        elif code == pickle.TUPLE:
            items = tuple(self._since_mark())
            self.stack.append(items)
        elif code in _TUPLES:
            n = _TUPLES[code]
            items = tuple(self._pop() for _ in range(n))[::-1]
            push(items)
        elif code in (pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS):
            self._extend(code)
        elif code == pickle.ADDITEMS:
            members = [_key(item) for item in self._since_mark()]
            self._top(set).update(members)
        elif code == pickle.GLOBAL:
            module, name = self.source.line(), self.source.line()
            push(self._global(module.decode(), name.decode()))
        elif code == pickle.STACK_GLOBAL:
            name, module = self._pop(), self._pop()
            push(self._global(module, name))
        elif code in (pickle.REDUCE, pickle.NEWOBJ):
            arguments, function = self._pop(), self._pop()
            push(_call(function, arguments))
        elif code == pickle.BUILD:
            self._build(self._pop())
        elif code == pickle.BINPERSID:
            if self.persistent is None:
                raise CheckpointError("it refers to objects outside of its pickle")
            push(self.persistent(self._pop()))
        elif code in (pickle.PROTO, pickle.FRAME):
            self.source.read(1 if code == pickle.PROTO else 8)  # both only help other readers
        else:
            if code == pickle.INST:  # an old way to call a global: name it, if it is hostile
                self._global(self.source.line().decode(), self.source.line().decode())
            raise CheckpointError(f"its pickle holds the opcode {code!r}, as no checkpoint does")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self.source.read(struct.calcsize(form)))[0]

    def _pop(self) -> Any:
        return self.stack.pop()

    def _top(self, *kinds: type) -> Any:
        if type(self.stack[-1]) not in kinds:
            raise CheckpointError(
                f"it is damaged: its pickle puts items into {_named(self.stack[-1])}"
            )
        return self.stack[-1]

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _extend(self, code: bytes) -> None:
        if code == pickle.APPEND:
            item = self._pop()
            self._top(list).append(item)
        elif code == pickle.APPENDS:
            items = self._since_mark()
            self._top(list).extend(items)
        else:
            if code == pickle.SETITEMS:
                items = self._since_mark()
            else:
                value, key = self._pop(), self._pop()
                items = [key, value]
            target = self._top(dict)
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_key(key)] = value

    def _memoise(self, index: int) -> None:
        self.memo[index] = self.stack[-1]
        if isinstance(self.stack[-1], Unbuilt):
            self.stack[-1].memoised.append(index)

    def _global(self, module: Any, name: Any) -> Any:
        if type(module) is not str or type(name) is not str:
            raise CheckpointError("it is damaged: a global whose name is not text")
        try:
            return self.table[module, name]
        except KeyError:
            full = f"{module}.{name}"
            shown = full if full.isprintable() and len(full) < 200 else repr(full[:200])
            raise CheckpointError(
                f"it needs the global {shown}, which is not among the inert ones that "
                "checkpoints hold; nothing was called"
            ) from None

    def _build(self, state: Any) -> None:
        target = self.stack[-1]
        if isinstance(target, Unbuilt):
            self.stack[-1] = target.built(state)
            for index in target.memoised:
                self.memo[index] = self.stack[-1]
        elif isinstance(target, Stateful):
            target.take(state)
        elif type(target) is not dict or type(state) is not dict:  # a dict's own are dropped
            raise CheckpointError(f"its pickle sets the state of {_named(target)}")


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Global) or type(arguments) is not tuple:
        raise CheckpointError(f"its pickle calls {_named(function)}")
    return function.make(*arguments)


def _key(key: Any) -> Any:
    """A key or member of a plain type: the hash of nested tuples can take for ever."""
    if type(key) not in _KEYS:
        raise CheckpointError(f"its pickle has {_named(key)} as a key")
    return key


def _named(value: Any) -> str:
    return value.name if isinstance(value, Global) else f"an object of type {type(value).__name__}"
