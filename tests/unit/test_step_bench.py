"""The figures of a decoding step: what adds up to what, on the tiny model."""

from dataclasses import replace

import torch

from kernels.ops import Ops
from parallel.mesh import Mesh
from parallel.model.decoder import Decoder
from parallel.model.load import build_decoder
from serve import step_bench
from tests.backends import backend
from tests.models import TINY, RandomWeights


def test_a_row_has_times_calls_and_the_limit(monkeypatch):
    ops = backend("compiled", torch.bfloat16)

    def decoder(backend: Ops) -> Decoder:
        weights, layers = RandomWeights(TINY), (TINY.num_layers,)
        return build_decoder(
            weights, Mesh.single(), layers, dtype=torch.bfloat16, ops=backend, trainable=False, packed=True
        )

    replaying, plain = decoder(ops), decoder(replace(ops, record=None))
    steps, num_calls = step_bench.Steps(replaying, 3), 5 * TINY.num_layers + 5
    assert all(steps.step() > 0 for _ in range(2))
    work, _, calls = steps.parts()
    assert work > 0
    assert calls == num_calls
    # every matrix once, the tied embedding as the head: panels of 48 rows, pairs of two columns
    shapes = [(72, 72), (24, 72), (24, 72), (72, 72), (100, 72), (100, 72), (72, 100)] * 5 + [(101, 72)]
    size = sum(-(-n // 48) * 48 * k * 2 for n, k in shapes)
    assert step_bench.weight_bytes(replaying) == size

    # the row itself by a clock that is known
    monkeypatch.setattr(step_bench.Steps, "step", lambda self: 2e-3 if self.runner.decoder is replaying else 5e-3)
    monkeypatch.setattr(step_bench.Steps, "parts", lambda self: (1.5e-3, 4e-4, calls))
    monkeypatch.setattr(step_bench, "_seconds", lambda _: 4e-3)
    monkeypatch.setattr(step_bench.timing, "read_bytes", lambda: 4 * size)
    row = step_bench.measure(replaying, plain, 3)
    assert row == ["3", "5.00 / 2.00", f"1.50 in {num_calls}", "0.40", "1.00, 50%"]
