"""PyTorch by itself: autocast over float32 weights, fused AdamW; DTensor, `pipelining`, DDP with sharded AdamW states.

`torch.distributed.pipelining` can't tie the embedding and the head across stages: its last stage trains a head of its
own, equal to the embedding in the first step only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from train.compare.cases import LEARNING_RATE, Job
from train.compare.llama import Llama, cross_entropy
from train.compare.peer import RANK, WORLD, batch, run


def main(job: Job) -> None:
    """Builds what the layout asks for and trains."""
    if WORLD > 1:
        dist.init_process_group("gloo")
    run(job, pipeline(job) if job.ways.pipeline > 1 else whole(job))


def precision(job: Job) -> AbstractContextManager[object]:
    """The computation's type; weights stay float32."""
    return torch.autocast("cpu", torch.bfloat16) if job.dtype == "bfloat16" else nullcontext()


def whole(job: Job) -> Callable[[], float]:
    """A step of a model that is whole, or cut within its layers."""
    model = Llama(job.architecture)
    model.load(job.model)
    net: nn.Module = model
    optimizer: torch.optim.Optimizer
    if job.ways.tensor > 1:
        cut(model, job.ways.tensor)
    if job.ways.data > 1:
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=0.0, fused=True
        )
    else:
        optimizer = adamw(model.parameters())
    parts = [list(x.split(job.microbatch_rows)) for x in batch(job)]

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for number, (ids_BT, labels_BT) in enumerate(zip(*parts, strict=True), 1):
            last = number == job.microbatches
            waits = net.no_sync() if isinstance(net, DistributedDataParallel) and not last else nullcontext()
            with waits, loss_parallel() if job.ways.tensor > 1 else nullcontext():
                with precision(job):
                    loss = cross_entropy(net(ids_BT), labels_BT) / job.microbatches
                loss.backward()
            total += number_of(loss)
        optimizer.step()
        return total

    return step


def pipeline(job: Job) -> Callable[[], float | None]:
    """A step of this rank's stage under 1F1B."""
    stages = job.ways.pipeline
    borders = [job.architecture.num_layers * stage // stages for stage in range(stages + 1)]
    model = Llama(job.architecture, borders[RANK], borders[RANK + 1])
    model.load(job.model)
    stage = PipelineStage(model, RANK, stages, torch.device("cpu"))
    schedule = Schedule1F1B(stage, job.microbatches, loss_fn=cross_entropy)
    optimizer = adamw(model.parameters())
    ids_BT, labels_BT = batch(job)

    def step() -> float | None:
        optimizer.zero_grad()
        losses: list[Tensor] | None = [] if stage.is_last else None
        with precision(job):
            schedule.step(
                *([ids_BT] if stage.is_first else []), target=labels_BT if stage.is_last else None, losses=losses
            )
        optimizer.step()
        return None if losses is None else sum(map(number_of, losses)) / len(losses)

    return step


def cut(model: Llama, size: int) -> None:
    """Tensor parallelism by DTensor: heads, inner columns, and vocabulary rows."""
    mesh = init_device_mesh("cpu", (size,))
    columns, rows = ColwiseParallel(), RowwiseParallel()
    parallelize_module(
        model,
        mesh,
        {
            "embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        },
    )
    plan: dict[str, ParallelStyle] = {"self_attn.o_proj": rows}
    plan |= {f"self_attn.{name}_proj": columns for name in "qkv"}
    plan |= {"mlp.gate_proj": columns, "mlp.up_proj": columns, "mlp.down_proj": rows}
    for block in model.layers.values():
        parallelize_module(block, mesh, plan)
    model.tie()


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """Fused AdamW; it refuses a group in which only some tensors are DTensors."""
    groups: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(isinstance(parameter.data, DTensor), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": members} for members in groups.values()], lr=LEARNING_RATE, weight_decay=0.0, fused=True
    )


def number_of(loss: Tensor) -> float:
    """The value of a loss, which may be a DTensor."""
    loss = loss.detach()
    return float(loss.full_tensor() if isinstance(loss, DTensor) else loss)


if __name__ == "__main__":
    main(Job.read(sys.argv[1]))
