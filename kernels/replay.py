"""A function's kernel calls, recorded once and replayed in C++: between them no Python, no GIL, no waking of threads.

    recording = Recording(lambda: decoder(ids, step))     runs it once
    ids.copy_(...)                                        new inputs go into the tensors of the recording
    out = recording.replay()                              the same tensor as recording.output, with new values

What isn't one of the C++ backend's kernels is called again from Python in its place: torch's own ops, and what is
wrapped in `outside` (communication). Of that, what is a C function (`Direct`) is called between the kernels instead. So
a replay does what the function did; only Python's own decisions are frozen. Every replay gives the bits of the function
itself. CUDA graphs are the model, of memory too: results live in memory that belongs to the recording and is used again
for later ones.
"""

from __future__ import annotations

import contextvars
import ctypes
import functools
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from kernels import cpu_ops

R = TypeVar("R")


@dataclass(frozen=True)
class Direct:
    """A C function that works on `x` in place: `int function(void* handle, void* x, uint64_t count, int kind)`.

    It returns 0 or the number of an error; the others of a group that it talks to may be gone then.
    """

    function: int
    """Its address."""
    handle: int
    x: Tensor
    """Contiguous, on the CPU."""
    kind: int
    error: Callable[[int], Exception]
    """What to raise, by the error's number. Whatever the handle needs lives as long as this."""
    note: Callable[[int], None]
    """Told after each replay how many calls were like this one; equal ones are told together."""


class Recording:
    """What `function` did; it must not depend on the values of its tensors but by kernels, and not need gradients."""

    output: Tensor
    """What the function returned; a replay writes it anew."""
    by_clock: bool
    """Whether replays note `times`, which costs each thread two readings of a clock a call."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        """Runs and records it.

        Raises:
            ValueError: it calls a kernel that can't be recorded, or one that would copy its arguments.
        """
        program: int = torch.ops.onemesh.record_begin()
        weakref.finalize(self, torch.ops.onemesh.forget, program)
        mode = _Recorder()
        token = _recorder.set(mode)
        try:
            with mode:
                self.output = function()
            mode.cut()
        finally:
            _recorder.reset(token)
            torch.ops.onemesh.record_end(mode.cuts)
        self._kept = mode.kept
        self._errors = mode.errors
        self._notes = tuple(mode.notes.items())
        self.by_clock = False
        self._program = program
        self._segments = tuple(enumerate(mode.outside))
        self._run = _function()

    def replay(self) -> Tensor:
        """Does it again with what stands in its inputs now; returns `output`.

        Raises what an `outside` call raises. Nothing behind that call is done then.
        """
        for segment, outside in self._segments:
            if not self._run(self._program, segment, self.by_clock):
                number, error = torch.ops.onemesh.replay_failure(self._program)  # raises if an input was refused
                raise self._errors[number](error)
            if outside:
                with torch.inference_mode():
                    for call in outside:
                        call()
        for note, calls in self._notes:
            note(calls)
        return self.output

    def times(self) -> Tensor:
        """float64 [2, threads, calls]: seconds on one clock when each thread began its work on a kernel call, and when
        it ended, in the last replay that was `by_clock`; 0 where it had none."""
        segments = range(len(self._segments))
        nothing = torch.empty(0)
        return torch.cat([torch.ops.onemesh.replay_times(nothing, self._program, i) for i in segments], dim=2)


@functools.cache
def _function() -> Any:
    """`onemesh_replay` of the library that is loaded; called without Python's lock."""
    function = ctypes.CDLL(str(cpu_ops.LIBRARY)).onemesh_replay
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool), ctypes.c_bool
    return function


def outside(function: Callable[[], R], direct: Callable[[], Direct | None] = lambda: None) -> R:
    """Calls `function`; when recording, every replay calls it again in its place. Its results must be tensors that it
    writes anew, for it to be called with the same ones.

    direct: the same as a C function where there is one, which replays call without Python.
    """
    recorder = _recorder.get()
    if recorder is None:
        return function()
    with _disable_current_modes():
        before: int = torch.ops.onemesh.recorded()
        result = function()
        if torch.ops.onemesh.recorded() != before:
            raise ValueError("a kernel call inside of `outside` can't be recorded")
        call = direct()
        if call is None:
            recorder.add(function)
        else:
            recorder.add_direct(call)
    return result


class _Recorder(TorchDispatchMode):
    """Keeps what kernels read, and how to call torch's own ops again."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        """What kernels read of other than the recording's own memory."""
        self._own: set[int] = set()
        self.cuts: list[int] = []
        """Numbers of kernel calls after which something is called from Python."""
        self.outside: list[list[Callable[[], object]]] = []
        """What is called after each of the cuts."""
        self.errors: list[Callable[[int], Exception]] = []
        """What a direct call's error is, by its number."""
        self.notes: Counter[Callable[[int], None]] = Counter()

    def cut(self) -> None:
        """Ends a segment of kernel calls, unless one ends here."""
        count: int = torch.ops.onemesh.recorded()
        if not self.cuts or self.cuts[-1] != count:
            self.cuts.append(count)
            self.outside.append([])

    def add_direct(self, call: Direct) -> None:
        """`call` is made here, between kernels."""
        x = call.x
        number = len(self.errors)
        torch.ops.onemesh.record_direct(call.function, call.handle, x.data_ptr(), x.numel(), call.kind, number)
        self.errors.append(call.error)
        self.notes[call.note] += 1
        if _memory(x) not in self._own:
            self.kept.append(x)

    def add(self, function: Callable[[], object]) -> None:
        """`function` is called here."""
        self.cut()
        self.outside[-1].append(function)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing compiles in here; guarding against it would import torch's compiler, a second in a server's step."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before: int = torch.ops.onemesh.recorded()
        result = func(*args, **kwargs)
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        if func.namespace == "onemesh":
            if torch.ops.onemesh.recorded() == before:
                raise ValueError(f"{func} can't be recorded")
            self._own |= {_memory(x) for x in outputs}
            self.kept += [x for x in inputs if _memory(x) not in self._own]
            return result
        if func._schema.is_mutable:
            self.add(functools.partial(func, *args, **kwargs))
        elif not {_memory(x) for x in outputs} <= {_memory(x) for x in inputs}:  # not just a view
            self.add(functools.partial(_again, func, args, kwargs, outputs))
        return result


_recorder: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar("recorder", default=None)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _again(func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
    results = (x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor))
    for output, x in zip(outputs, results, strict=True):
        output.copy_(x)
