"""Every layout computes what one process computes: loss, every gradient and ten steps, in float64."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch

from conf.schema import TuneConf
from kernels import dispatch
from parallel import comm, gradients
from parallel.comm import Launch
from parallel.mesh import Mesh
from tests.models import BIASED, TINY, RandomWeights
from tests.ranks import on_ranks
from tests.training import Outcome, Run, layout, mesh_of, rows_of, train, train_rank
from train import step
from train.model import build_model
from train.step import Trainer

LORA = TuneConf(kind="lora", rank=4, alpha=8.0, dropout=0.25)
PREFIX = TuneConf(kind="prefix", virtual_tokens=5)
PROJECTED = TuneConf(kind="prefix", virtual_tokens=5, prefix_projection=True, prefix_hidden=12)
TUNES = {"full": TuneConf(kind="full"), "lora": LORA, "prefix": PREFIX, "projected": PROJECTED}

LAYOUTS = {
    "data2": layout(data=2),
    "tensor2": layout(tensor=2),
    "tensor3": layout(tensor=3),
    "tensor4": layout(tensor=4),
    "pipeline2": layout(pipeline=2, microbatches=3),
    "pipeline3_gpipe": layout(pipeline=3, microbatches=4, schedule="gpipe", stages=(1, 3, 1)),
    "tensor2_pipeline2": layout(tensor=2, pipeline=2, microbatches=2),
    "data2_tensor2_accumulate": layout(data=2, tensor=2, microbatches=2),
    "interleaved2": layout(pipeline=2, microbatches=3, schedule="interleaved", virtual_stages=2),
    "zero_bubble2_tensor2": layout(pipeline=2, tensor=2, microbatches=3, schedule="zero_bubble"),
    "zbv2_data2": layout(data=2, pipeline=2, microbatches=3, schedule="zbv", virtual_stages=2, stages=(1, 1, 2, 1)),
}


@cache
def alone(tune: str, steps: int) -> Outcome:
    """One process, one microbatch."""
    return train(Run(tune=TUNES[tune], steps=steps))


def assert_equal(run: Outcome, expected: Outcome) -> None:
    """Bit for bit."""
    assert (run.losses, run.norms) == (expected.losses, expected.norms)
    for field in ("gradients", "parameters"):
        ours, theirs = getattr(run, field), getattr(expected, field)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), f"{field} of {name}"


def assert_same(run: Outcome, expected: Outcome, tolerance: float) -> None:
    """Losses, and norm-wise every gradient and parameter."""
    for ours, theirs in zip(run.losses, expected.losses, strict=True):
        assert abs(ours - theirs) <= tolerance * abs(theirs)
    for field in ("gradients", "parameters"):
        ours, theirs = getattr(run, field), getattr(expected, field)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            error = (ours[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)
            assert error <= tolerance, f"{field} of {name} differ by {error:.1e}"


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_every_gradient_are_those_of_one_process(name: str, tune: str) -> None:
    assert_same(train(replace(LAYOUTS[name], tune=TUNES[tune])), alone(tune, 1), 1e-10)


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_ten_steps_end_where_one_process_ends(name: str, tune: str) -> None:
    assert_same(train(replace(LAYOUTS[name], tune=TUNES[tune], steps=10)), alone(tune, 10), 1e-8)


SCHEDULES = {
    "1f1b": layout(schedule="1f1b"),
    "zero_bubble": layout(schedule="zero_bubble"),
    "interleaved": layout(schedule="interleaved", virtual_stages=2, stages=(2, 1, 1, 1)),
    "zbv": layout(schedule="zbv", virtual_stages=2, stages=(1, 1, 1, 2)),
}


@cache
def gpipe(tune: str, tied: bool, microbatches: int) -> Outcome:
    """Three steps of it on two ranks, in float32."""
    return train(_three_steps(layout(schedule="gpipe"), tune, tied, microbatches))


def _three_steps(run: Run, tune: str, tied: bool, microbatches: int) -> Run:
    architecture = TINY if tied else replace(TINY, tied_embeddings=False)
    return replace(
        run,
        pipeline=2,
        microbatches=microbatches,
        dtype="float32",
        steps=3,
        tune=TUNES[tune],
        architecture=architecture,
    )


@pytest.mark.parametrize(
    ("name", "tune", "tied", "microbatches"),
    [
        *((name, "full", True, 3) for name in SCHEDULES),
        *((name, "full", False, 4) for name in ("interleaved", "zbv")),
        *((name, "full", True, 1) for name in ("zero_bubble", "zbv")),
        *((name, "lora", True, 3) for name in ("zero_bubble", "zbv")),
        *((name, "prefix", True, 3) for name in ("1f1b", "interleaved", "zbv")),
    ],
)
def test_schedules_agree_bitwise(name: str, tune: str, tied: bool, microbatches: int) -> None:
    run = train(_three_steps(SCHEDULES[name], tune, tied, microbatches))
    assert_equal(run, gpipe(tune, tied, microbatches))


@pytest.mark.parametrize("name", ["1f1b", "zero_bubble"])
def test_schedules_with_the_same_stages_agree_bitwise_on_a_projected_prefix(name: str) -> None:
    """Its inner layers sum over a rank's layers, so other stages give other roundings."""
    assert_equal(train(_three_steps(SCHEDULES[name], "projected", True, 3)), gpipe("projected", True, 3))


@pytest.mark.parametrize(
    "run",
    [
        layout(packing=False),
        layout(recompute="full"),
        layout(microbatches=4),
        layout(data=2, microbatches=5),
        layout(pipeline=2, microbatches=9, schedule="gpipe"),
    ],
    ids=["unpacked", "recompute", "accumulate", "empty_microbatches", "empty_pipeline_microbatches"],
)
def test_cutting_the_batch_otherwise_changes_nothing(run: Run) -> None:
    for tune in TUNES:
        assert_same(train(replace(run, tune=TUNES[tune])), alone(tune, 1), 1e-10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "run", [layout(), layout(recompute="full"), layout(pipeline=2), layout(data=2)],
    ids=["plain", "recompute", "pipeline", "data"],
)  # fmt: skip
def test_packs_kept_over_a_step_change_no_bit(run: Run, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(run, dtype=dtype, microbatches=3, steps=3)
    kept = train(run)
    monkeypatch.setattr(step, "packs_kept", lambda *_, **__: nullcontext())
    fresh = train(run)
    assert (kept.losses, kept.norms) == (fresh.losses, fresh.norms)
    for name, values in kept.parameters.items():
        assert torch.equal(values, fresh.parameters[name]), name
        assert torch.equal(kept.gradients[name], fresh.gradients[name]), name


@pytest.mark.parametrize("name", ["tensor3", "tensor4", "tensor2_pipeline2"])
def test_untied_models_with_biases(name: str) -> None:
    expected = train(layout(architecture=BIASED))
    assert_same(train(replace(LAYOUTS[name], architecture=BIASED)), expected, 1e-10)


def test_replicas_agree_bitwise_over_many_buckets() -> None:
    """Cut parameters make the buckets of tensor ranks differ; a ring's order of summation must not show it."""
    run = layout(data=3, tensor=2, dtype="float32", steps=2)
    on_ranks(run.ranks, _train_with_small_buckets, run)


def _train_with_small_buckets(launch: Launch, run: Run) -> None:
    gradients.BUCKET_BYTES = 30_000
    placed = {spec.name: (spec, block) for spec, block in train_rank(launch, run)[2]}
    mesh = Mesh.build(launch, data=run.data, tensor=run.tensor)
    norms = [block for spec, block in placed.values() if spec.name.endswith("norm.weight")]
    assert len(norms) == 11
    facts = {str(i): block.tobytes().hex() for i, block in enumerate(norms)}
    assert comm.disagreements(facts, mesh.tensor) == []


def test_tensor_degree_up_to_the_head_count() -> None:
    for size in (5, 9):
        for tune in ("full", "prefix"):
            assert_same(train(layout(tensor=size, tune=TUNES[tune])), alone(tune, 1), 1e-10)
    assert TINY.num_heads == 9


def _evaluate(launch: Launch, run: Run) -> float:
    config = run.config
    mesh = mesh_of(launch, run)
    ops = dispatch.select(torch.device("cpu"), torch.float64)
    trainer = Trainer(config, build_model(config, RandomWeights(run.architecture), mesh, ops))
    return trainer.evaluate(rows_of(1, 10, run.architecture.vocab_size))  # pyright: ignore[reportArgumentType]


def test_validation_loss_is_the_same_under_every_layout() -> None:
    expected = _evaluate(Launch(), Run(tune=PREFIX))
    for name in ("data2", "pipeline3_gpipe", "tensor2_pipeline2", "interleaved2", "zbv2_data2"):
        run = replace(LAYOUTS[name], tune=PREFIX)
        assert on_ranks(run.ranks, _evaluate, run) == [pytest.approx(expected, rel=1e-10)] * run.ranks


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_follows_float32(dtype: str) -> None:
    exact = train(layout(dtype="float32", steps=5, tensor=2))
    low = train(layout(dtype=dtype, steps=5, tensor=2))
    assert low.losses == pytest.approx(exact.losses, rel=2e-3)
    assert low.losses != exact.losses
