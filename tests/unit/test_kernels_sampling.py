"""Draws and log-probabilities: numpy and the compiled form against a full sort with exact integers, bad arguments."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import sampling
from tests.backends import backend
from tests.unit.test_kernels_compiled import SETS

ROOT = Path(__file__).parents[2]
FORMS = ["numpy", "compiled"]


@pytest.fixture(params=FORMS)
def ops(request) -> sampling.SamplingOps:
    return form(request.param)


def form(name: str) -> sampling.SamplingOps:
    if name == "numpy":
        return sampling.NUMPY
    backend("compiled", torch.float32)  # skips where there is no library
    return sampling.select(torch.device("cpu"))


def oracle(row: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> tuple[int, float]:
    """The token by a full sort and sums of Python's integers, and how near (of the sum) its interval's border is."""
    logits = row.astype(np.float64)
    largest = logits.max()
    order = [i for i in np.lexsort((np.arange(len(row)), -logits)) if row[i] > -np.inf]
    if min_p:
        order = [i for i in order if row[i] >= np.float32(largest + temperature * math.log(min_p))]
    if 0 < top_k < len(order):
        order = [i for i in order if row[i] >= row[order[top_k - 1]]]
    weights = [round(math.exp((logits[i] - largest) / temperature) * 2**42) for i in order]
    sums = np.cumsum(np.array(weights, dtype=object))
    if top_p < 1:
        last = next(i for i, total in enumerate(sums) if total >= max(1, math.ceil(top_p * float(sums[-1]))))
        sums = sums[: last + 1]
    target = int(u * 2**53) * int(sums[-1])
    at = next(i for i, total in enumerate(sums) if int(total) << 53 > target)
    return int(order[at]), min(abs(u - float(total) / float(sums[-1])) for total in sums)


def one(ops: sampling.SamplingOps, row, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, u=0.0) -> int:
    return draws(ops, torch.as_tensor(row)[None], [(temperature, top_k, top_p, min_p, u)])[0]


def draws(ops: sampling.SamplingOps, logits: torch.Tensor, params, rows=None) -> list[int]:
    columns = list(zip(*params, strict=True)) if params else [()] * 5
    dtypes = (torch.float64, torch.int64, torch.float64, torch.float64, torch.float64)
    rows = torch.arange(len(params)) if rows is None else torch.tensor(rows)
    return ops.draw(logits, rows, *(torch.tensor(c, dtype=d) for c, d in zip(columns, dtypes, strict=True))).tolist()


def rows_of_all_kinds(vocab: int, seed: int) -> dict[str, torch.Tensor]:
    """Rows that are peaked, flat, tied, masked, clustered at many scales, near float32's limits."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(vocab, generator=generator)
    masked, outlier = normal.clone() * 3, normal.clone() * 1e-3
    masked[torch.rand(vocab, generator=generator) < 0.7] = -torch.inf
    outlier[0] = -30.0  # all others share a bucket
    scales = 10.0 ** -(torch.arange(vocab) % 12).float()
    return {
        "peaked": normal * 8,
        "usual": normal * 3,
        "flat": normal * 1e-2,
        "bfloat16": (normal * 3).bfloat16().float(),
        "equal": torch.zeros(vocab),
        "two values": (normal > 1).float(),
        "masked": masked,
        "outlier": outlier,
        "clusters": normal.sign() * scales,
        "huge": normal * 5e37,
        "lowest": torch.where(normal > 0, normal, torch.finfo(torch.float32).min),
        "large offset": normal * 1e-3 + 1e4,
    }


PARAMS = [
    (1.0, 0, 1.0, 0.0), (0.7, -1, 0.9, 0.0), (2.0, 40, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.3, 0, 1.0, 0.05),
    (0.9, 700, 0.8, 0.01), (100.0, 0, 0.999, 0.0), (1e-4, 0, 0.5, 0.0), (1.0, 10**9, 1e-9, 1.0), (5.0, 0, 1.0, 1e-300),
]  # fmt: skip


@pytest.mark.parametrize("vocab", [1, 2, 7, 130, 2500])
def test_draws_are_those_of_a_full_sort(ops, vocab):
    generator, compared, skipped = np.random.default_rng(vocab), 0, 0
    for kind, row in rows_of_all_kinds(vocab, vocab).items():
        if row.max() == -torch.inf:
            continue
        for params in PARAMS:
            for u in (0.0, 1 - 2**-53, *generator.random(3)):
                expected, distance = oracle(row.numpy(), *params, u)
                if distance < 1e-11 and 0 < u < 1 - 2**-53:
                    skipped += 1  # exp rounded otherwise may move a border by as much
                    continue
                compared += 1
                if params[2] < 1 and u > 0.5:  # the nucleus' own border may lie within a rounding of exp
                    near = {
                        oracle(row.numpy(), *params[:2], params[2] * (1 + e), params[3], u)[0]
                        for e in (-1e-12, 0, 1e-12)
                    }
                    assert one(ops, row, *params, u) in near, (kind, params, u)
                else:
                    assert one(ops, row, *params, u) == expected, (kind, params, u)
    assert compared > 100
    assert skipped < compared / 20


def test_both_forms_draw_the_same_tokens_of_a_large_vocabulary():
    numpy, compiled = form("numpy"), form("compiled")
    rows = rows_of_all_kinds(30011, 5)
    logits = torch.stack(list(rows.values()))
    different = 0
    for params in PARAMS:
        for u in (0.0, 0.123, 0.5, 0.987):
            each = [(*params, u)] * len(logits)
            different += sum(
                a != b for a, b in zip(draws(numpy, logits, each), draws(compiled, logits, each), strict=True)
            )
    assert different == 0


def test_a_draw_has_no_company(ops, thread_counts):
    """Any batch, any place in it, any number of threads, rows of a wider matrix."""
    rows = rows_of_all_kinds(5003, 1)
    logits = torch.stack(list(rows.values()))
    params = [(*PARAMS[i % len(PARAMS)], (i * 0.37) % 1) for i in range(len(logits))]
    alone = [one(ops, row, *p) for row, p in zip(logits.clone(), params, strict=True)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert draws(ops, logits, params) == alone
        assert draws(ops, logits, params[::-1], rows=list(range(len(logits)))[::-1]) == alone[::-1]
        wide = torch.cat((torch.full((len(logits), 3), torch.nan), logits, torch.full((len(logits), 2), 1e9)), 1)
        assert draws(ops, wide[:, 3:-2], params) == alone
        assert draws(ops, logits, params[2:3] * 3, rows=[2, 2, 2]) == alone[2:3] * 3
    assert draws(ops, logits, []) == []


def test_rows_without_a_finite_largest_logit(ops):
    vocab = 77
    for bad in (torch.nan, torch.inf):
        for at in (0, 16, 63, 64, 76):
            row = torch.randn(vocab)
            row[at] = bad
            assert [one(ops, row, temperature) for temperature in (0.0, 1.0)] == [-1, -1]
    nothing = torch.full((vocab,), -torch.inf)
    assert [one(ops, nothing, temperature) for temperature in (0.0, 1.0)] == [-1, -1]
    nothing[70] = -3.0
    assert [one(ops, nothing, temperature, u=0.999) for temperature in (0.0, 1.0)] == [70, 70]
    assert one(ops, torch.tensor([torch.finfo(torch.float32).max, 0.0])) == 0


def test_logprobs_are_those_of_float64(ops):
    for kind, row in rows_of_all_kinds(3001, 2).items():
        exact = row.double().log_softmax(-1)
        order = np.lexsort((np.arange(3001), -row.numpy()))
        for id in (0, 1500, int(row.argmax())):
            for num_top in (0, 1, 20):
                found, ids, values = ops.logprobs(row[None], *(torch.tensor([n]) for n in (0, id, num_top)))
                assert ids.shape == values.shape == (1, num_top)
                torch.testing.assert_close(found[0], exact[id], rtol=1e-12, atol=1e-7)
                kept = [int(i) for i in order[:num_top] if row[i] > -torch.inf]
                assert ids[0].tolist() == kept + [-1] * (num_top - len(kept)), kind
                torch.testing.assert_close(values[0, : len(kept)], exact[kept], rtol=1e-12, atol=1e-7)


def test_logprobs_of_several_rows(ops):
    logits = torch.randn(4, 50)
    logits[1, 3:] = -torch.inf
    found, ids, values = ops.logprobs(logits, torch.tensor([3, 1]), torch.tensor([7, 40]), torch.tensor([2, 5]))
    exact = logits.double().log_softmax(-1)
    assert found[1] == -torch.inf
    torch.testing.assert_close(found[0], exact[3, 7], rtol=0, atol=1e-7)
    assert ids[0].tolist() == [*exact[3].topk(2).indices.tolist(), -1, -1, -1]
    assert (ids[1, 3:].tolist(), values[1, 3:].tolist()) == ([-1, -1], [-torch.inf] * 2)


GOOD = {
    "draw": {
        "logits": torch.zeros(3, 8), "rows": torch.tensor([0, 2]), "temperature": torch.ones(2).double(),
        "top_k": torch.zeros(2).long(), "top_p": torch.ones(2).double(), "min_p": torch.zeros(2).double(),
        "u": torch.zeros(2).double(),
    },
    "logprobs": {
        "logits": torch.zeros(3, 8), "rows": torch.tensor([0, 2]), "ids": torch.tensor([0, 7]),
        "num_top": torch.tensor([0, 8]),
    },
}  # fmt: skip
VALUES = {
    "rows": (-1, 3), "temperature": (-0.1, math.nan, math.inf, 1e-30), "top_p": (0.0, 1.1, math.nan),
    "min_p": (-0.1, 1.1, math.nan), "u": (-0.1, 1.0, math.nan), "ids": (-1, 8), "num_top": (-1, 9),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_bad_arguments_are_named(name):
    form("compiled")
    op, good = getattr(torch.ops.onemesh, name), GOOD[name]
    op(**good)
    for argument, x in good.items():
        for bad in (x.float() if argument != "logits" else x.double(), x.int(), x[None], x[..., :0]):
            with pytest.raises(RuntimeError, match=rf"{name}: .*\b({argument}|rows)\b"):
                op(**(good | {argument: bad}))
        for value in VALUES.get(argument, ()):
            bad = x.clone()
            bad[1] = value
            with pytest.raises(RuntimeError, match=rf"{name}: {argument}\[1\]="):
                op(**(good | {argument: bad}))


@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_draws_the_same(name):
    """As numpy, on a few thousand tokens: vectors of any width, with and without fused multiply-adds."""
    form("compiled")
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    missing = [flag for flag in SETS[name] if flag not in flags]
    if missing:
        pytest.skip(f"this processor has no {', '.join(missing)}")
    code = """
import torch
from kernels import sampling
from tests.unit.test_kernels_sampling import PARAMS, draws, rows_of_all_kinds
compiled = sampling.select(torch.device("cpu"))
assert compiled.name == "compiled"
logits = torch.stack(list(rows_of_all_kinds(4001, 3).values()))
for params in PARAMS:
    each = [(*params, 0.07 * i) for i in range(len(logits))]
    assert draws(compiled, logits, each) == draws(sampling.NUMPY, logits, each), params
rows, ids = torch.arange(len(logits)), torch.arange(len(logits)) * 300
for a, b in zip(*(o.logprobs(logits, rows, ids, ids % 7) for o in (compiled, sampling.NUMPY)), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-9)
print("checked")
"""
    environment = os.environ | {"ONEMESH_CPU_ISA": name}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "checked\n", done.stderr


def test_without_the_library_numpy_draws(monkeypatch):
    monkeypatch.setattr("kernels.cpu_ops.load", lambda: None)
    assert sampling.select(torch.device("cpu")) is sampling.NUMPY
