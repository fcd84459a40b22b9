"""ZeRO stage 1: bitwise plain AdamW on the same layout, with the optimizer's state shared out over the replicas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conf.schema import OptimConf
from kernels import dispatch
from parallel import checkpoint, gradients, zero
from parallel.checkpoint import Block, TensorFile, blocks
from parallel.checkpoint.verify import verify
from parallel.comm import Launch
from parallel.mesh import Mesh
from tests.dist.test_training_parity import TUNES
from tests.models import BIASED, RandomWeights
from tests.ranks import needs_shared_memory, on_ranks
from tests.training import Run, layout, perturb, rows_of, train_rank
from train import saving
from train.model import build_model
from train.step import Trainer

ADAMW = OptimConf(lr=1e-2, schedule="cosine", decay_steps=10, weight_decay=0.1, clip_norm=0.5)
ZERO = replace(ADAMW, kind="zero1")

LAYOUTS = {
    "data3": layout(data=3, microbatches=2),
    "data2_tensor2": layout(data=2, tensor=2),  # overlapping KV heads
    "data2_pipeline2": layout(data=2, pipeline=2, microbatches=3),  # a tied embedding on both stages
    "data2_zbv": layout(data=2, pipeline=2, schedule="zbv", virtual_stages=2, microbatches=3),  # on one, twice
    "context2_sequence": layout(context=2, tensor=2, sequence=True),
}


def small_buckets() -> None:
    """Several buckets, cut within parameters, and windows that don't divide what they gather."""
    gradients.BUCKET_BYTES = 30_000
    zero.CHUNK = gradients.CHUNK = 48
    zero.WINDOW = 1000


def both(launch: Launch, run: Run) -> list[str]:
    """What differs between the two optimizers on this rank."""
    small_buckets()
    plain, sharded = (train_rank(launch, replace(run, optim=optim)) for optim in (ADAMW, ZERO))
    assert len(plain[0]) == run.steps
    wrong = [name for name, at in (("losses", 0), ("norms", 1)) if plain[at] != sharded[at]]
    for at, what in ((2, "gradient"), (3, "parameter")):
        for (spec, ours), (_, theirs) in zip(sharded[at], plain[at], strict=True):
            if ours.tobytes() != theirs.tobytes():
                wrong.append(f"{what} of {spec.name}")
    return wrong


@needs_shared_memory
@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_bit_is_that_of_plain_adamw(name: str, tune: str) -> None:
    run = replace(LAYOUTS[name], dtype="float32", steps=4, tune=TUNES[tune])
    assert on_ranks(run.ranks, both, run) == [[]] * run.ranks


@needs_shared_memory
@pytest.mark.parametrize(
    "run",
    [
        layout(data=2, dtype="float16", steps=3),
        layout(data=2, dtype="bfloat16", steps=3, microbatches=3),
        layout(data=2, dtype="float32", steps=3, architecture=BIASED, recompute="full"),
        layout(tensor=2, dtype="float32", steps=3),
    ],
    ids=["float16", "bfloat16", "biased", "one_replica"],
)
def test_loss_scaling_low_precision_and_untied_models(run: Run) -> None:
    assert on_ranks(run.ranks, both, run) == [[]] * run.ranks


def _state(launch: Launch, run: Run) -> tuple[int, int, dict[tuple[str, str], int]]:
    small_buckets()
    config = run.config
    mesh = Mesh.build(launch, data=run.data, pipeline=run.pipeline, tensor=run.tensor)
    ops = dispatch.select(torch.device("cpu"), torch.float32)
    trainer = Trainer(config, build_model(config, RandomWeights(run.architecture), mesh, ops))
    perturb(trainer.placed)
    mesh.traffic.clear()
    trainer.step(1, rows_of(1, run.batch_size, run.architecture.vocab_size))
    moments = sum(
        state[name].numel() for state in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    )
    return moments, sum(p.numel() for _, p in trainer.placed), mesh.traffic.calls


@pytest.mark.parametrize("name", ["data3", "data2_tensor2", "data2_pipeline2"])
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_rank_holds_the_moments_of_its_share_alone(name: str, tune: str) -> None:
    run = replace(LAYOUTS[name], dtype="float32", optim=ZERO, tune=TUNES[tune])
    found = on_ranks(run.ranks, _state, run)
    slack = 48 * 2 * 20  # a chunk for each bucket
    for moments, parameters, _ in found:
        assert abs(moments - 2 * parameters / run.data) <= slack
    model = found[: run.ranks // run.data]
    assert sum(moments for moments, _, _ in found) == 2 * sum(parameters for _, parameters, _ in model)


@needs_shared_memory
@pytest.mark.parametrize("optim", [ADAMW, ZERO], ids=["adamw", "zero1"])
def test_accumulating_takes_no_more_reductions(optim: OptimConf) -> None:
    """The step's collectives over the replicas don't depend on the number of microbatches."""
    counts = []
    for microbatches in (1, 4):
        run = layout(data=2, dtype="float32", optim=optim, microbatches=microbatches)
        calls = on_ranks(2, _state, run)[0][2]
        counts.append({key: count for key, count in calls.items() if key[1] != "tensor"})
    assert counts[0] == counts[1]
    if optim is ZERO:
        assert counts[0]["reduce_scatter", "data+context"] > 4
        assert counts[0]["all_reduce", "data+context"] == 3  # tokens, the loss, and the chunks of the norm
    else:
        assert ("reduce_scatter", "data+context") not in counts[0]


class _Largest(TorchDispatchMode):
    """Bytes of the largest memory that an operation made."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.num_bytes = max(self.num_bytes, x.untyped_storage().nbytes())
        return out


def _save(launch: Launch, run: Run, folder: Path) -> tuple[int, int, int, int]:
    small_buckets()
    config = run.config
    mesh = Mesh.build(launch, data=run.data, tensor=run.tensor)
    ops = dispatch.select(torch.device("cpu"), torch.float32)
    trainer = Trainer(config, build_model(config, RandomWeights(run.architecture), mesh, ops))
    trainer.step(1, rows_of(1, run.batch_size, run.architecture.vocab_size))
    written: list[int] = []
    write = blocks._write_exactly
    blocks._write_exactly = lambda file, data, at: (written.append(len(data)), write(file, data, at))[1]
    mesh.traffic.clear()
    with _Largest() as largest, torch.no_grad():
        weights = [Block(spec, p) for spec, p in trainer.placed]
        files = [TensorFile("model.safetensors", weights, {}), saving._optimizer_file(trainer)]
        checkpoint.save(folder / "step-1", files, {}, mesh)
    held = sum(p.nbytes for _, p in trainer.placed)
    return sum(written), held, sum(mesh.traffic.bytes.values()), largest.num_bytes


def test_a_save_moves_and_holds_names_and_sums_alone(tmp_path: Path) -> None:
    """Each rank writes its share of the bytes once; no values travel, and no copy of a block is made."""
    run = layout(data=2, tensor=2, dtype="float32", optim=ZERO)
    found = on_ranks(4, _save, run, tmp_path)
    assert verify(tmp_path / "step-1").problems == ()
    files = [*(tmp_path / "step-1").rglob("*.safetensors")]
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    assert sum(written for written, _, _, _ in found) == sum(tensor.nbytes for tensor in tensors)
    largest = max(tensor.nbytes for tensor in tensors)
    for written, held, moved, made in found:
        assert written <= 0.65 * 3 * held  # half of what the two replicas hold, or their turns in writing
        assert moved <= 40_000
        assert made <= largest / 2, "a tensor of the size of a block"
