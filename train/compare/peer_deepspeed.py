"""DeepSpeed on CPU: ZeRO-1 for one process and for data parallelism, with AutoTP, or its own 1F1B pipeline."""

# pyright: reportMissingImports=false
from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from conf.schema import Architecture
from train.compare.cases import LEARNING_RATE, Job
from train.compare.llama import Block, Llama, cross_entropy, read_weights
from train.compare.peer import batch, run

TIED = "embedding"


class Embedding(nn.Module):
    """First and last layer of the pipeline; DeepSpeed ties them by `weight`."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(a.vocab_size, a.width))

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Ids to hidden states."""
        return F.embedding(ids_BT, self.weight)

    @staticmethod
    def head(layer: Embedding, x_BTD: Tensor) -> Tensor:
        """Hidden states to logits."""
        return F.linear(x_BTD, layer.weight)


def main(job: Job) -> None:
    """Builds what the layout asks for and trains."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_default_dtype(torch.float32)
    deepspeed.init_distributed("gloo")
    run(job, pipeline(job) if job.ways.pipeline > 1 else whole(job))


def settings(job: Job) -> dict[str, Any]:
    """DeepSpeed's configuration. In bf16 it has float32 masters, but stage 0 without its pipeline has none."""
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": job.microbatch_rows,
        "gradient_accumulation_steps": job.microbatches,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1 if job.ways.pipeline == 1 else 0},
        "bf16": {"enabled": job.dtype == "bfloat16"},
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    if job.ways.tensor > 1:
        columns, rows = r".*\.(q|k|v|gate|up)_proj\.weight$", r".*\.(o|down)_proj\.weight$"
        specs = [
            {"patterns": [columns], "partition_type": "column"},
            {"patterns": [rows], "partition_type": "row"},
        ]
        partition = {"use_default_specs": False, "layer_specs": specs}
        found["tensor_parallel"] = {"autotp_size": job.ways.tensor, "partition_config": partition}
    return found


def whole(job: Job) -> Callable[[], float]:
    """A step of a model that is whole, or cut within its layers."""
    model = Llama(job.architecture)
    model.load(job.model)
    engine = deepspeed.initialize(model=model, config=settings(job), optimizer=adamw(model.parameters()))[0]
    parts = [list(x.split(job.microbatch_rows)) for x in batch(job)]

    def step() -> float:
        total = 0.0
        for ids_BT, labels_BT in zip(*parts, strict=True):
            loss = cross_entropy(engine(ids_BT), labels_BT)
            engine.backward(loss)
            engine.step()  # updates after the last microbatch
            total += float(loss.detach())
        return total / job.microbatches

    return step


def pipeline(job: Job) -> Callable[[], float]:
    """A step of this rank's stage under 1F1B, embedding and head tied."""
    a = job.architecture
    layers = [
        TiedLayerSpec(TIED, Embedding, a),
        *(LayerSpec(Block, a) for _ in range(a.num_layers)),
        LayerSpec(nn.RMSNorm, a.width, a.norm_eps),
        TiedLayerSpec(TIED, Embedding, a, forward_fn=Embedding.head),
    ]
    net = PipelineModule(
        layers,
        num_stages=job.ways.pipeline,
        loss_fn=cross_entropy,
        partition_method="type:Block",
        activation_checkpoint_interval=0,
    )
    load(net, job)
    engine = deepspeed.initialize(model=net, config=settings(job), optimizer=adamw(net.parameters()))[0]
    parts = [x.split(job.microbatch_rows) for x in batch(job)]

    def step() -> float:
        return engine.train_batch(iter(list(zip(*parts, strict=True))))

    return step


def load(net: PipelineModule, job: Job) -> None:
    """Takes the stage's weights; DeepSpeed names layer i of the list (0: embedding) `i.<name>`."""
    weights, after = read_weights(job.model), job.architecture.num_layers + 1
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            place, _, rest = name.partition(".")
            if place == "tied_modules":
                theirs = "model.embed_tokens.weight"
            else:
                theirs = f"model.norm.{rest}" if int(place) == after else f"model.layers.{int(place) - 1}.{rest}"
            parameter.copy_(weights[theirs])


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """torch's fused AdamW; building DeepSpeed's own for CPUs takes minutes."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


if __name__ == "__main__":
    main(Job.read(sys.argv[1]))
    dist.destroy_process_group()
