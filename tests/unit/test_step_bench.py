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
    monkeypatch.setattr(step_bench, "ROUNDS", 2)

    def decoder(backend: Ops) -> Decoder:
        weights, layers = RandomWeights(TINY), (TINY.num_layers,)
        return build_decoder(
            weights, Mesh.single(), layers, dtype=torch.bfloat16, ops=backend, trainable=False, packed=True
        )

    replaying = decoder(ops)
    row = step_bench.measure(replaying, decoder(replace(ops, record=None)), 3)
    plain, replayed = map(float, row[1].split(" / "))
    work, calls = row[2].split(" in ")
    assert row[0] == "3"
    assert int(calls) == 5 * TINY.num_layers + 5
    assert 0 < float(work) < replayed < plain, "30 calls from Python take longer than one"
    assert float(row[3]) < replayed
    # every matrix once, the tied embedding as the head: panels of 48 rows, pairs of two columns
    shapes = [(72, 72), (24, 72), (24, 72), (72, 72), (100, 72), (100, 72), (72, 100)] * 5 + [(101, 72)]
    assert step_bench.weight_bytes(replaying) == sum(-(-n // 48) * 48 * k * 2 for n, k in shapes)
