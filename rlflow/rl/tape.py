"""A tape of the operations on tensors that happen under it, and the recording that it becomes.

An operation is done but once where all it reads is held, or where it makes a view of what moves; the others are every
call. Those whose results nobody reads are dropped, and an elementwise one writes to what it reads where nobody reads
that again. What is given, moving, held and burnt in: recorded.py.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode

mapped: Any = map_aggregate  # over nested tuples, lists and dicts, whatever they hold
ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default}
BACKWARD = {
    getattr(torch.ops.aten, f"{name}_backward") for name in ("threshold", "silu", "tanh", "sigmoid", "softplus")
}
"""With a place to write to."""
FUNCTIONS: dict[Any, Any] = {torch.ops.aten.cat.default: torch.cat, torch.ops.aten.stack.default: torch.stack}
FUNCTIONS |= {torch.ops.aten.where.self: torch.where}
PLAIN = ("add", "clamp", "div", "exp", "log", "mul", "neg", "pow", "relu", "sigmoid", "sub", "tanh")
PRODUCTS = ("addmm", "baddbmm", "bmm", "mm")
SHAPES = ("amin", "expand", "gt", "select", "sum", "t", "transpose", "unsqueeze", "view")
METHODS = frozenset([*PLAIN, *PRODUCTS, *SHAPES, *(f"{name}_" for name in PLAIN)])
"""Operations that Python reaches faster under another name, with the same arguments."""


class CannotRecordError(RuntimeError):
    """The function is not a fixed list of operations on tensors."""


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor."""

    number: int


@dataclass
class _Operation:
    """func(*args, **kwargs) of slots, to a slot or several."""

    func: Any
    args: Any
    kwargs: Any
    out: _Slot | list[_Slot]
    reads: list[int]
    writes: bool
    value: Any  # burnt in: a number that was read, or a shape that depends on numbers
    once: bool = False

    @property
    def makes(self) -> list[int]:
        return [slot.number for slot in (self.out if isinstance(self.out, list) else [self.out])]


class Tape(TorchDispatchMode):
    """Lets operations happen and writes them down."""

    def __init__(self, given: list[Tensor], moving: list[Tensor]):
        super().__init__()
        self.tensors: list[Tensor] = []  # by slot; while they live, their ids are their own
        self.slots: dict[int, _Slot] = {}
        self.operations: list[_Operation] = []
        self.given = [self._slot(v).number for v in given]
        self.moving = [self._slot(v).number for v in moving]
        self.held: list[int] = []
        self.turned: dict[int, _Slot] = {}  # ids of transposed tensors, and of what
        self.written: set[int] = set()  # storages
        self.why_not: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True imports torch.compile, a second of CPU time, to shield this class from it

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, outside = kwargs or {}, len(self.tensors)
        noted = mapped((args, kwargs), lambda v: self._slot(v) if isinstance(v, Tensor) else v)
        self.held += range(outside, len(self.tensors))
        out = func(*args, **kwargs)
        same = self._same(func, noted[0], out)
        if same is None:
            self._note(func, noted, out)
        else:
            self.tensors.append(out)
            self.slots[id(out)] = same
        return out

    def _same(self, func: Any, args: Any, out: Any) -> _Slot | None:
        """What it is another name for."""
        if func in ALIASES:
            return args[0]
        if func is torch.ops.aten.t.default:
            self.turned[id(out)] = args[0]
            return self.turned.get(id(self.tensors[args[0].number]))
        if func is torch.ops.aten.view.default and out.shape == self.tensors[args[0].number].shape:
            return args[0]
        return None

    def _note(self, func: Any, noted: Any, out: Any) -> None:
        if torch.Tag.nondeterministic_seeded in func.tags and not _never_drops(func, noted[0]):
            self.why_not = f"{func} draws random numbers: they have to be given"
        reads: list[int] = []
        mapped(noted, lambda v: reads.append(v.number) if isinstance(v, _Slot) else None)
        writes, value = func._schema.is_mutable, None
        if writes:
            self.written |= self._written(func, *noted)
        if isinstance(out, Tensor):
            value = tuple(out.shape) if self._shape_varies(func, reads) else None
        elif not isinstance(out, (tuple, list)):
            value = out
        made = [self._slot(v) for v in out] if isinstance(out, (tuple, list)) else self._slot(out)
        self.operations.append(_Operation(func, noted[0], noted[1], made, reads, writes, value))

    def _slot(self, value: Any) -> _Slot:
        """Of a tensor; a number or None, which operations may give too, has one of its own."""
        if not isinstance(value, Tensor):
            value = torch.empty(0)
        if id(value) not in self.slots:
            self.slots[id(value)] = _Slot(len(self.tensors))
            self.tensors.append(value)
        return self.slots[id(value)]

    def _shape_varies(self, func: Any, reads: list[int]) -> bool:
        """Picking by numbers does not; by a mask it does."""
        if torch.Tag.dynamic_output_shape not in func.tags:
            return False
        by_number = func is torch.ops.aten.index.Tensor
        return not by_number or any(self.tensors[r].dtype in (torch.bool, torch.uint8) for r in reads[1:])

    def _storage(self, slot: int) -> int:
        return int(self.tensors[slot].untyped_storage()._cdata)

    def _written(self, func: Any, args: Any, kwargs: Any) -> set[int]:
        found: list[int] = []
        for place, named in enumerate(func._schema.arguments):
            if named.alias_info is not None and named.alias_info.is_write:
                value = args[place] if place < len(args) else kwargs.get(named.name)
                mapped((value,), lambda v: found.append(v.number) if isinstance(v, _Slot) else None)
        return {self._storage(slot) for slot in found}

    def recording(self, out: Any, counts: list[int]) -> Recording:
        """Ready to run; CannotRecordError where it would not give what the function gives."""
        if self.why_not is not None:
            raise CannotRecordError(self.why_not)
        if self.written & {self._storage(s) for s in (*self.given, *self.moving, *self.held)}:
            raise CannotRecordError("it changes a tensor that it was given")
        self._part()
        noted = mapped((out,), lambda v: self._slot(v) if isinstance(v, Tensor) else v)[0]
        wanted: set[int] = set()
        mapped((noted,), lambda v: wanted.add(v.number) if isinstance(v, _Slot) else None)
        kept = self._needed(wanted)
        once, each = ([op for op in kept if op.once is which] for which in (True, False))
        before = {s for op in once for s in op.makes} | set(self.held)
        used = {r for op in each for r in op.reads} | wanted
        ready = [s for s in sorted(before) if s in used]
        moving = [s for s in self.moving if s in used]
        self._in_place(each, [*self.given, *moving, *ready, *wanted])
        burnt = [(op.out, op.value) for op in once if op.value is not None]
        outside = [*self.held, *self.moving]
        first = _emit(once, outside, ([_Slot(s) for s in ready], [slot for slot, _ in burnt]))
        main = _emit(each, [*self.given, *moving, *ready], noted)
        met, moves = ([self.tensors[s] for s in slots] for slots in (outside, moving))
        return Recording(first, main, met, moves, [value for _, value in burnt], counts)

    def _part(self) -> None:
        """Mark what is done but once: reads what is held, or makes a view of what moves."""
        fixed = set(self.held) | set(self.moving)
        moving = {self._storage(s) for s in self.moving}
        for op in self.operations:
            made = {self._storage(s) for s in op.makes}
            views = not any(self._storage(r) in moving for r in op.reads) or (bool(made) and made <= moving)
            op.once = views and not op.writes and not made & self.written and fixed.issuperset(op.reads)
            if op.once:
                fixed.update(op.makes)
            elif op.value is not None:
                raise CannotRecordError(f"{op.func} reads a value that differs from call to call")

    def _in_place(self, operations: list[_Operation], kept: list[int]) -> None:
        """Elementwise operations write to what they read where nobody reads it again: the same bits, less memory."""
        last = {self._storage(r): i for i, op in enumerate(operations) for r in op.reads}
        last |= dict.fromkeys(map(self._storage, kept), len(operations))
        became: dict[int, int] = {}  # a storage that is another now
        for i, op in enumerate(operations):
            twin = _twin(op)
            if twin is None or isinstance(op.out, list):
                continue
            read, made = self.tensors[op.reads[0]], self.tensors[op.out.number]
            here, there = (self._storage(slot) for slot in (op.reads[0], op.out.number))
            here = became.get(here, here)
            alone = all(became.get(s, s) != here for s in map(self._storage, op.reads[1:]))
            alike = read.shape == made.shape and read.stride() == made.stride() and read.dtype == made.dtype
            if here != there and last.get(here) == i and alone and alike and made.is_contiguous():
                op.func, op.kwargs = twin[0], op.kwargs | dict.fromkeys(twin[1:], op.args[0])
                became[there], last[here] = here, last.get(there, i)

    def _needed(self, wanted: set[int]) -> list[_Operation]:
        """The operations that results come from."""
        alive, kept = set(wanted), list[_Operation]()
        for op in reversed(self.operations):
            if op.writes or op.value is not None or alive.intersection(op.makes):
                alive.update(op.reads)
                kept.append(op)
        return kept[::-1]


@dataclass
class Recording:
    """`first` makes what is held ready, `main` is every call."""

    first: Callable[..., Any]
    main: Callable[..., Any]
    outside: list[Tensor]
    moving: list[Tensor]
    values: list[Any]
    counts: list[int]
    proven: bool = False
    ready: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.renew()

    @torch.no_grad()
    def renew(self) -> bool:
        """False where a value that was burnt in is another now."""
        self.ready, read = self.first(*self.outside)
        return self.values == [tuple(v.shape) if isinstance(v, Tensor) else v for v in read]

    @torch.no_grad()
    def __call__(self, given: list[Tensor]) -> Any:
        return self.main(*given, *self.moving, *self.ready)


def _emit(operations: list[_Operation], inputs: list[int], out: Any) -> Callable[..., Any]:
    """A Python function of the inputs."""
    graph, nodes = fx.Graph(), dict[int, fx.Node]()
    for slot in inputs:
        nodes[slot] = graph.placeholder(f"v{slot}")

    def filled(noted: Any) -> Any:
        return mapped(noted, lambda v: nodes[v.number] if isinstance(v, _Slot) else v)

    for op in operations:
        name, args, kwargs = op.func.overloadpacket.__name__, filled(op.args), filled(op.kwargs)
        if name in METHODS and isinstance(
            args[0], fx.Node
        ):  # half a microsecond less than the operation under its full name
            node = graph.call_method(name, args, kwargs)
        else:
            node = graph.call_function(FUNCTIONS.get(op.func, op.func), args, kwargs)
        if isinstance(op.out, list):
            nodes |= {slot.number: graph.call_function(operator.getitem, (node, i)) for i, slot in enumerate(op.out)}
        else:
            nodes[op.out.number] = node
    graph.output(filled(out))
    return fx.GraphModule({}, graph).forward


def _never_drops(func: Any, args: Any) -> bool:
    """True for attention without dropout, the only randomness in it."""
    names = [named.name for named in func._schema.arguments]
    if "dropout_p" not in names:
        return False
    place = names.index("dropout_p")
    return (args[place] if place < len(args) else 0.0) == 0.0


def _twin(op: _Operation) -> tuple[Any, ...] | None:
    """What does the same in place, and under which name it is told where, if at all."""
    packet = op.func.overloadpacket
    if not op.args or not isinstance(op.args[0], _Slot):
        return None
    if packet in BACKWARD:
        return packet.grad_input, "grad_input"
    twin = getattr(getattr(torch.ops.aten, f"{packet.__name__}_", None), op.func._overloadname, None)
    return None if twin is None else (twin,)
