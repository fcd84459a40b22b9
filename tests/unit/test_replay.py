"""A replay gives the bits of the function that was recorded: on new inputs, any number of threads, whatever is joined."""

import ctypes
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from conf.schema import Architecture
from kernels.ops import LowRank, Part
from kernels.replay import Direct, Recording, outside
from serve.batch import LoadedAdapter
from tests.backends import backend, packed
from tests.models import BAICHUAN_13B, BIASED, GEMMA2, GEMMA3, GLM4, QWEN3, TINY
from tests.replays import DTYPES, decoding, draw, num_calls, runner_of

pytestmark = pytest.mark.usefixtures("no_gradients")


def check(function: Callable[[], Tensor], inputs: Sequence[Tensor], *, outsides: int = 0) -> Recording:
    """Records `function` and compares replays with calls of it, at several numbers of threads and inputs."""
    recording = Recording(function)
    assert sum(len(calls) for _, calls in recording._segments) == outsides
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for x in inputs:
            x.copy_(torch.randn(x.shape))
        expected = function()
        assert expected.isfinite().all() and expected.numel() > 0
        assert torch.equal(recording.replay(), expected), threads
    return recording


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "calls"), [(1, 2), (9, 2), (64, 2), (130, 4), (700, 4)])
def test_norm_linears_and_gate(dtype: torch.dtype, rows: int, calls: int, thread_counts: None) -> None:
    """Few rows: the norm and the linears behind it are one call, with the gate behind them."""
    ops, width, ffn = backend("compiled", dtype), 97, 101
    x, delta, w = draw(rows, width, dtype=dtype), draw(rows, width, dtype=dtype), draw(width, dtype=dtype)
    gate, up, down = (packed(ops, draw(*s, dtype=dtype) * 0.1) for s in [(ffn, width), (ffn, width), (width, ffn)])
    bias = draw(ffn, dtype=dtype)

    def function() -> Tensor:
        total, h = ops.add_rms_norm(x, delta, w, 1e-5)
        both = ops.linears(h, [Part(gate, bias), Part(up)])
        # behind the joined calls: what they left for others is complete
        return ops.linear(ops.silu_gate(*both), down) + total + h + both[1].sum()

    recording = check(function, [x, delta], outsides=4)
    assert num_calls(recording) == calls


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_updates_of_some_rows(dtype: torch.dtype, thread_counts: None) -> None:
    ops = backend("compiled", dtype)
    x, w, norm = draw(6, 50, dtype=dtype), packed(ops, draw(70, 50, dtype=dtype)), draw(50, dtype=dtype)
    a, b = packed(ops, draw(3, 50, dtype=dtype)), packed(ops, draw(70, 3, dtype=dtype))

    def function() -> Tensor:
        h = ops.rms_norm(x, norm, 1e-5)
        update = LowRank(start=2, stop=5, a_RK=a, b_NR=b)
        return ops.silu_gate(*ops.linears(h, [Part(w, None, [update]), Part(w)]))

    check(function, [x])


def test_views_torch_ops_and_writes_in_place() -> None:
    ops = backend("compiled", torch.float32)
    x, w, total = draw(4, 6), packed(ops, draw(6, 6)), torch.zeros(4, 6)
    calls: list[int] = []

    def function() -> Tensor:
        y = ops.linear(x[:, :6].unflatten(-1, (2, 3)).flatten(1), w)
        z = torch.where(y > 0, y, 2 * y)  # three ops
        z.mul_(3)
        assert outside(lambda: (calls.append(1), total.copy_(z))[1]) is total
        return ops.linear(total, w)

    check(function, [x], outsides=5)
    assert len(calls) == 1 + 2 * 3


FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int)


class Doubling:
    """Doubles its tensor, as a C function that may fail."""

    def __init__(self) -> None:
        self.code, self.calls, self.noted = 0, 0, []
        self._function = FUNCTION(self._double)

    def _double(self, handle: int, data: int, count: int, kind: int) -> int:
        assert handle == 5 and kind == 7
        numbers = (ctypes.c_float * count).from_address(data)
        numbers[:] = [2 * x for x in numbers]
        self.calls += 1
        return self.code

    def __call__(self, x: Tensor) -> Tensor:
        return outside(lambda: x.mul_(2), lambda: self._direct(x))

    def _direct(self, x: Tensor) -> Direct:
        address = ctypes.cast(self._function, ctypes.c_void_p).value
        assert address is not None
        return Direct(address, 5, x, 7, lambda code: OSError(f"code {code}"), self.noted.append)


def test_c_functions_are_called_between_the_kernels(thread_counts: None) -> None:
    ops = backend("compiled", torch.float32)
    x, w = draw(3, 16), packed(ops, draw(16, 16) * 0.3)
    doubling = Doubling()

    def function() -> Tensor:
        return ops.linear(doubling(ops.linear(doubling(ops.linear(x, w)), w)), w)

    recording = check(function, [x])
    assert num_calls(recording) == 5 and len(recording._segments) == 1
    assert set(doubling.noted) == {2}, "calls of one kind are told together"
    assert doubling.calls == sum(doubling.noted) >= 2 * 3


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_behind_a_c_function_that_fails_nothing_is_done(threads: int, thread_counts: None) -> None:
    """All threads stop: none waits for the one that failed."""
    ops = backend("compiled", torch.float32)
    x, w, w_next = draw(3, 200), packed(ops, draw(200, 200) * 0.3), packed(ops, draw(200, 200) * 0.3)
    doubling = Doubling()
    results: list[Tensor] = []

    def function() -> Tensor:
        results.append(doubling(ops.linear(x, w)))
        return ops.linear(results[-1], w_next)

    recording = Recording(function)
    torch.set_num_threads(threads)
    expected = recording.output.clone()
    recording.output.zero_()
    doubling.code = 3
    for recording.by_clock in (False, True):
        with pytest.raises(OSError, match="code 3"):
            recording.replay()
        assert not recording.output.any()
    assert recording.times()[:, :, :2].any() and not recording.times()[:, :, 2:].any()
    assert not doubling.noted
    doubling.code = 0
    assert torch.equal(recording.replay(), expected)


def test_results_that_are_freed_make_room_for_later_ones() -> None:
    """A long chain lives in the memory of a few links, and no two results alive at once share it."""
    ops = backend("compiled", torch.float32)
    x, w = draw(3, 16), packed(ops, draw(16, 16) * 0.3)
    seen: set[int] = set()

    def function() -> Tensor:
        y = x
        for _ in range(40):
            before, y = y, ops.linear(y, w)
            seen.add(y.data_ptr())
            assert before.data_ptr() != y.data_ptr()
        return y

    recording = Recording(function)
    assert len(seen) < 8
    kept = recording.output
    expected = function()
    assert torch.equal(recording.replay(), expected)
    alive = weakref.ref(recording)
    del recording
    gc.collect()
    assert alive() is None
    assert torch.equal(kept, expected), "the output outlives the recording"


def test_calls_that_are_joined_do_not_overwrite_what_the_others_read() -> None:
    """Their threads don't wait for each other: what the norm reads is not yet free when the gate writes."""
    ops = backend("compiled", torch.float32)
    x, w, norm = draw(3, 16), packed(ops, draw(16, 16) * 0.3), draw(16)
    overwrites: list[bool] = []

    def function() -> Tensor:
        y, delta = ops.linear(x, w), ops.linear(x, w)
        read = {y.data_ptr(), delta.data_ptr()}
        y, h = ops.add_rms_norm(y, delta, norm, 1e-5)
        del y, delta
        h = ops.linears(h, [Part(w), Part(w)])
        h = ops.silu_gate(*h)
        overwrites.append(h.data_ptr() in read)
        return h

    assert num_calls(check(function, [x])) == 3
    assert not overwrites[0], "while it was recorded; later calls have other memory"


def test_what_a_recording_reads_is_kept_alive() -> None:
    ops = backend("compiled", torch.float32)
    x = draw(2, 5)

    def record() -> tuple[Recording, Tensor]:
        w = draw(7, 5)
        weight = packed(ops, w)
        recording = Recording(lambda: ops.linear(x, weight))
        return recording, x @ w.t()

    recording, expected = record()
    rubbish = [torch.full((1, 4, 48, 1), float("nan")) for _ in range(100)]
    torch.testing.assert_close(recording.replay(), expected)
    assert rubbish


def test_what_cannot_be_recorded_is_refused_and_nothing_stays() -> None:
    ops = backend("compiled", torch.float32)
    x, w, scattered = draw(4, 6), packed(ops, draw(6, 6)), torch.randn(6, 2, 4).permute(2, 1, 0)
    slots, pages = torch.arange(4), torch.zeros(2, 4, 2, 6)
    angles = torch.zeros(4, 6), torch.zeros(4, 6)
    for function, message in [
        (lambda: ops.pack((6, 6), torch.float32, lambda a, b: x[a:b]), r"onemesh.\w+.default can't be recorded"),
        (lambda: ops.rotary_write(scattered, scattered, scattered, *angles, pages, pages, slots), "q lies scattered"),
        (lambda: outside(lambda: ops.linear(x, w)), "inside of `outside`"),
        (lambda: Recording(lambda: x).output, "records already"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            Recording(function)
        check(lambda: ops.linear(x, w), [x])


def test_recording_does_not_import_the_compiler() -> None:
    """It takes a second or two: a request would wait for it."""
    backend("compiled", torch.float32)
    code = """
import sys, torch
from kernels import cpu_ops, cpu_rows
from kernels.replay import Recording
cpu_ops.load()
with torch.inference_mode():
    Recording(lambda: cpu_rows.rms_norm(torch.ones(2, 3), torch.ones(3), 1e-5) + 1).replay()
print([name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n", done.stdout


def test_integers_are_checked_at_every_replay() -> None:
    ops = backend("compiled", torch.float32)
    w, ids = draw(5, 3), torch.tensor([0, 4])
    recording = Recording(lambda: ops.embedding(ids, w))
    ids[1] = 5
    with pytest.raises(RuntimeError, match=r"ids\[1\]=5 of 5 rows"):
        recording.replay()
    ids[1] = 2
    assert torch.equal(recording.replay(), w[ids])


@pytest.mark.parametrize("architecture", [TINY, replace(BIASED, sliding_window=9)])
def test_decoding_has_the_bits_of_the_plain_decoder(architecture: Architecture) -> None:
    """Five calls a layer, and nothing outside the kernels but two biases; prefixes and longer tables included."""
    ops = backend("compiled", torch.bfloat16)
    plain, replaying = runner_of(architecture, replace(ops, record=None)), runner_of(architecture, ops)
    adapters = [None, "prefix", None, "prefix"]
    for runner in (plain, replaying):
        runner.adapters["prefix"] = LoadedAdapter("prefix", pages=(198, 199), length=7)
        for cache in runner.cache.keys + runner.cache.values:
            cache.copy_(torch.sin(torch.arange(cache.numel())).view(cache.shape))
    for got, expected in zip(decoding(replaying, 20, adapters), decoding(plain, 20, adapters), strict=True):
        assert torch.equal(got, expected)
    steps = replaying.replays._steps
    assert {count for count, _ in steps} == {1, 2, 3, 4} and not plain.replays._steps
    for step in steps.values():
        biases = 2 * architecture.num_layers * architecture.output_bias
        assert sum(len(calls) for _, calls in step.recording._segments) == biases
        layers, around = 5 * architecture.num_layers, 5  # ids, angles; two gathers, norm with the head
        assert num_calls(step.recording) == layers + around
    replaying.replays.forget()
    assert not replaying.replays._steps


@pytest.mark.parametrize("architecture", [QWEN3, GEMMA2, GEMMA3, GLM4, BAICHUAN_13B])
def test_decoding_of_other_architectures_has_the_bits_of_the_plain_decoder(architecture: Architecture) -> None:
    ops = backend("compiled", torch.bfloat16)
    plain, replaying = runner_of(architecture, replace(ops, record=None)), runner_of(architecture, ops)
    for got, expected in zip(decoding(replaying, 12, [None] * 3), decoding(plain, 12, [None] * 3), strict=True):
        assert torch.equal(got, expected)
    assert len(replaying.replays.steps) == 3 and not plain.replays.steps


def test_numbers_of_kernel_calls_do_not_grow_with_what_was_recorded_before() -> None:
    ops = backend("compiled", torch.float32)
    x, w = draw(2, 6), packed(ops, draw(6, 6))
    counts = [num_calls(Recording(lambda: ops.linear(x, w))) for _ in range(3)]
    assert all(a == b == 1 for a, b in pairwise(counts))
