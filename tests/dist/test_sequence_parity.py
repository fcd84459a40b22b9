"""Sequence parallelism and selective recomputation compute what one process computes, and talk as much as they should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import TuneConf
from kernels import dispatch
from parallel import comm, regions, tensor
from parallel.comm import Group, Launch
from parallel.mesh import Mesh
from parallel.sequence import Split
from tests.dist.test_training_parity import PREFIX, TUNES, _evaluate, alone, assert_same
from tests.kept import a_layer_keeps, formula, needs_cpu_kernels
from tests.models import BIASED, TINY, RandomWeights
from tests.ranks import needs_shared_memory, on_ranks
from tests.training import Outcome, Run, layout, rows_of, train, train_rank
from train.model import build_model
from train.step import Trainer


# the 7 rows of a step: 7 microbatches are a row each, one of them of a single token; 9 leave some without tokens
CASES: dict[str, tuple[Run, str]] = {
    "tensor2": (layout(tensor=2), "full"),
    "tensor2_projected": (layout(tensor=2), "projected"),
    "tensor3_rows": (layout(tensor=3, microbatches=7), "full"),
    "tensor3_lora": (layout(tensor=3, recompute="selective"), "lora"),
    "tensor4_selective": (layout(tensor=4, recompute="selective"), "full"),
    "tensor5_prefix": (layout(tensor=5, microbatches=7), "prefix"),
    "tensor2_full_recompute": (layout(tensor=2, recompute="full", microbatches=2), "full"),
    "data2_empty": (layout(data=2, tensor=2, microbatches=5, recompute="selective"), "full"),
    "data2_lora": (layout(data=2, tensor=2, recompute="full"), "lora"),
    "pipeline2_empty": (layout(tensor=2, pipeline=2, microbatches=9), "full"),
    "pipeline2_lora": (layout(tensor=2, pipeline=2, microbatches=3, schedule="gpipe", stages=(1, 4)), "lora"),
    "pipeline2_prefix": (layout(tensor=2, pipeline=2, microbatches=3, recompute="selective"), "prefix"),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_are_those_of_one_process(name: str) -> None:
    run, tune = CASES[name]
    assert_same(train(replace(run, sequence=True, tune=TUNES[tune])), alone(tune, 1), 1e-10)


def test_untied_models_with_biases() -> None:
    run = layout(architecture=BIASED)
    assert_same(train(replace(run, tensor=3, sequence=True, recompute="selective")), train(run), 1e-10)


def test_ten_steps_end_where_one_process_ends() -> None:
    run = layout(tensor=3, sequence=True, steps=10, microbatches=3, recompute="selective")
    assert_same(train(run), alone("full", 10), 1e-8)


def test_validation_loss_is_that_of_one_process() -> None:
    run = layout(tensor=2, pipeline=2, sequence=True, recompute="selective", microbatches=3, tune=PREFIX)
    expected = _evaluate(Launch(), Run(tune=PREFIX))
    assert on_ranks(4, _evaluate, run) == [pytest.approx(expected, rel=1e-10)] * 4


def same_bits(run: Outcome, other: Outcome, but: Callable[[str], bool] = lambda _: False) -> None:
    """Losses and gradients, except of the parameters named."""
    assert run.losses == other.losses
    for name, gradient in run.gradients.items():
        assert but(name) or torch.equal(gradient, other.gradients[name]), f"{name} differs"


@pytest.mark.parametrize(("tune", "dtype"), [("full", "bfloat16"), ("lora", "bfloat16"), ("prefix", "float32")])
def test_recomputing_changes_no_bit(tune: str, dtype: str) -> None:
    run = layout(dtype=dtype, microbatches=3, tune=TUNES[tune])
    runs = [train(replace(run, recompute=recompute)) for recompute in ("none", "selective", "full")]
    same_bits(runs[1], runs[0])
    same_bits(runs[2], runs[0])


@needs_shared_memory
@pytest.mark.parametrize("tune", ["full", "lora", "prefix"])
def test_splitting_changes_no_bit_but_in_sums_over_tokens(tune: str) -> None:
    """The gradient of a norm is one: of a rank's share first. Adapters train no norm: all their steps are the same."""
    run = layout(tensor=3, dtype="bfloat16", steps=1 if tune == "full" else 3, tune=TUNES[tune])
    whole = train(run)
    for recompute in ("none", "selective", "full"):
        found = train(replace(run, sequence=True, recompute=recompute))
        same_bits(found, whole, lambda name: name.endswith("norm.weight"))


def _traffic(launch: Launch, run: Run) -> tuple[dict[Any, int], dict[Any, int], int]:
    mesh = Mesh.build(launch, tensor=run.tensor)
    ops = dispatch.select(torch.device("cpu"), torch.float32)
    trainer = Trainer(run.config, build_model(run.config, RandomWeights(run.architecture), mesh, ops))
    mesh.traffic.clear()
    result = trainer.step(1, rows_of(1, run.batch_size, run.architecture.vocab_size))
    return mesh.traffic.calls, mesh.traffic.bytes, result.tokens


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_collectives_of_a_step(recompute: str) -> None:
    """Per layer 2 gathers and 2 scatters each way, and 2 gathers of what isn't kept (arXiv:2205.05198, sec. 4.2.2)."""
    run = layout(tensor=2, sequence=True, dtype="float32", recompute=recompute)
    calls, sizes, tokens = on_ranks(2, _traffic, run)[0]
    layers, row = TINY.num_layers, TINY.width * 4
    rows = rows_of(1, run.batch_size, TINY.vocab_size)
    targets = sum(int(r.targets[1:].sum()) for r in rows)
    # a layer that is computed again gathers twice and scatters once: it ends before its last sum
    again = (2, 1) if recompute == "full" else (2, 0)
    gathers, scatters = 4 + again[0], 4 + again[1]
    # besides: the embedding's scatter and the loss's gather, and their opposites backward
    assert calls["all_gather", "tensor"] == gathers * layers + 2
    assert calls["reduce_scatter", "tensor"] == scatters * layers + 2
    assert sizes["reduce_scatter", "tensor"] == (scatters * layers + 1) * tokens * row + targets * row
    assert calls["all_reduce", "tensor"] == 2 + 1  # the loss's sums; the KV head that both ranks hold
    # of gathers the longest share counts; of the loss's rows that depends on where they are
    share = -(-tokens // 2) * row
    most = sizes["all_gather", "tensor"] - (gathers * layers + 1) * share
    assert targets * row / 2 <= most <= targets * row
    # norms are replicated: their gradients are summed over the tensor axis, in one bucket
    assert sizes["all_reduce", "data+context+tensor"] == (2 * layers + 1) * row


def test_a_prefix_gathers_nothing_twice() -> None:
    """No weight trains that would need a linear's input again."""
    tune = TuneConf(kind="prefix", virtual_tokens=5)
    calls, _, _ = on_ranks(2, _traffic, layout(tensor=2, sequence=True, dtype="float32", tune=tune))[0]
    layers = TINY.num_layers
    assert calls["all_gather", "tensor"] == (2 * layers + 1) + 2 * layers
    # what enters the first layer needs no gradient, nor does the embedding
    assert calls["reduce_scatter", "tensor"] == (1 + 2 * layers) + (2 * layers - 1 + 1)


def _keeps(launch: Launch, run: Run) -> tuple[int, int]:
    return a_layer_keeps(launch, run), formula(launch, run)


@needs_cpu_kernels
def test_what_a_layer_keeps() -> None:
    run = layout(tensor=2, dtype="float32")
    for recompute in ("none", "selective"):
        for sequence in (False, True):
            for counted, expected in on_ranks(2, _keeps, replace(run, sequence=sequence, recompute=recompute)):
                assert counted == expected


def _own(x: Tensor, group: Group, at: Split) -> Tensor:
    """A share of this rank's x instead of the sum's."""
    return x.split(at.sizes)[at.rank].contiguous()


def _turned(x: Tensor, group: Group, at: Split) -> Tensor:
    """Shares end to end in the wrong order."""
    return torch.cat(comm.all_gather(x, group, at.sizes, 0).split(at.sizes)[::-1])


class _Unsummed(regions._Gather):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _own(grads[0], ctx.group, ctx.split), None, None


class _Partial(regions._Scatter):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, split: Split) -> Tensor:
        ctx.group, ctx.split = group, split
        return _own(x, group, split)


class _Misplaced(regions._Scatter):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _turned(grads[0], ctx.group, ctx.split), None, None


class _Right(regions._Gather):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, split: Split) -> Tensor:
        ctx.group, ctx.split = group, split
        return comm.all_gather(x, group, split.sizes, 0)


MUTATIONS: dict[str, Sequence[tuple[Any, str, Any]]] = {
    "gradients of norms not summed": [
        (tensor, "place", lambda *args, place=tensor.place: replace(place(*args), reduce="none"))
    ],
    "shares in the wrong order": [(regions, "gather", _turned)],
    "gathered again in the wrong order": [(regions, "gather", _turned), (regions, "_Gather", _Right)],
    "gradient not summed on entering": [(regions, "_Gather", _Unsummed)],
    "sum left out on leaving": [(regions, "_Scatter", _Partial)],
    "gradient of another share on leaving": [(regions, "_Scatter", _Misplaced)],
    "loss of the rows before": [
        (Split, "local", lambda self, rows_B, local=Split.local: (local(self, rows_B) - 1).clamp_min(0))
    ],
}
"""What is put in whose place."""


def _mutated(launch: Launch, run: Run, mutation: str) -> Any:
    for owner, name, value in MUTATIONS[mutation]:
        setattr(owner, name, value)
    return train_rank(launch, run)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_region_is_noticed(mutation: str) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_same(train(layout(tensor=2, sequence=True), _mutated, mutation), alone("full", 1), 1e-10)
    assert "failed" not in str(caught.value), "it ran, and was wrong"
