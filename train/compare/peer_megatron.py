"""Megatron-core's GPTModel with its schedules, gradient buffers and optimizer, on CPU; ZeRO-1 for data parallelism."""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from train.compare import megatron_on_cpu

megatron_on_cpu.install()  # before megatron is imported

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

from train.compare.cases import LEARNING_RATE, LENGTH, Job  # noqa: E402
from train.compare.llama import read_weights  # noqa: E402
from train.compare.peer import NOT_TRAINED, batch, run  # noqa: E402


def main(job: Job) -> None:
    """Builds the model and trains."""
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(job.ways.tensor, job.ways.pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = transformer(job)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        job.architecture.vocab_size,
        LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=int(job.architecture.rope_theta),
    )
    load(model, job)
    run(job, stepper(job, config, model))


def transformer(job: Job) -> TransformerConfig:
    """The shape and the layout in Megatron's words."""
    a, dtype = job.architecture, getattr(torch, job.dtype)
    return TransformerConfig(
        num_layers=a.num_layers,
        hidden_size=a.width,
        num_attention_heads=a.num_heads,
        num_query_groups=a.num_kv_heads,
        kv_channels=a.head_dim,
        ffn_hidden_size=a.ffn_width,
        normalization="RMSNorm",
        layernorm_epsilon=a.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        tensor_model_parallel_size=job.ways.tensor,
        pipeline_model_parallel_size=job.ways.pipeline,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=job.dtype == "bfloat16",
        batch_p2p_comm=True,
        deallocate_pipeline_outputs=job.ways.pipeline > 1,
    )


def load(model: GPTModel, job: Job) -> None:
    """Takes this rank's share of the weights from the Hugging Face directory."""
    weights, a, size = read_weights(job.model), job.architecture, job.ways.tensor
    rank = parallel_state.get_tensor_model_parallel_rank()

    def linear(layer: str, name: str) -> Tensor:
        return weights[f"{layer}.{name}_proj.weight"]

    def fused(layer: str, name: str) -> Tensor:
        """Megatron keeps q, k and v together, by KV group; and gate above up, on each rank."""
        if "linear_qkv" in name:
            grouped = [linear(f"{layer}.self_attn", x).unflatten(0, (a.num_kv_heads, -1)) for x in "qkv"]
            return torch.cat(grouped, 1).flatten(0, 1).chunk(size)[rank]
        if "linear_fc1" in name:
            return torch.cat([linear(f"{layer}.mlp", x).chunk(size)[rank] for x in ("gate", "up")])
        if "linear_proj" in name or "linear_fc2" in name:
            return linear(layer, "self_attn.o" if "linear_proj" in name else "mlp.down").chunk(size, 1)[rank]
        norm = "input_layernorm" if "input_layernorm" in name else "post_attention_layernorm"
        return weights[f"{layer}.{norm}.weight"]

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("decoder.layers."):
                place, _, rest = name.removeprefix("decoder.layers.").partition(".")
                number = model.decoder.layers[int(place)].layer_number - 1
                parameter.copy_(fused(f"model.layers.{number}", rest))
            elif "final_layernorm" in name:
                parameter.copy_(weights["model.norm.weight"])
            else:
                parameter.copy_(weights["model.embed_tokens.weight"].chunk(size)[rank])


def stepper(job: Job, config: TransformerConfig, model: GPTModel) -> Callable[[], Tensor | None]:
    """A step by Megatron's own schedule: without pipelining, or 1F1B."""
    bf16, sharded = job.dtype == "bfloat16", job.ways.data > 1
    buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=sharded)
    net = DistributedDataParallel(config, buffers, Float16Module(config, model) if bf16 else model)
    options = OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        weight_decay=0.0,
        clip_grad=0.0,
        bf16=bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=sharded,
    )
    optimizer = get_megatron_optimizer(options, [net])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = net.no_sync
    ids, labels = (x.split(job.microbatch_rows) for x in batch(job))
    positions = torch.arange(LENGTH).expand(job.microbatch_rows, LENGTH)
    hidden_from = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    schedule = get_forward_backward_func()

    def forward(numbers: Iterator[int], model: GPTModel) -> tuple[Tensor, Callable[[Tensor], object]]:
        number = next(numbers)
        trained = labels[number] != NOT_TRAINED

        def mean(loss_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = (loss_BT.float() * trained).sum() / trained.sum()
            return loss, {"loss": loss.detach().clone()}

        return model(ids[number], positions, hidden_from, labels=labels[number].clamp(0)), mean

    def step() -> Tensor | None:
        net.zero_grad_buffer()
        optimizer.zero_grad()
        found = schedule(
            forward_step_func=forward,
            data_iterator=iter(range(job.microbatches)),
            model=[net],
            num_microbatches=job.microbatches,
            seq_length=LENGTH,
            micro_batch_size=job.microbatch_rows,
            forward_only=False,
        )
        optimizer.step()
        return torch.stack([part["loss"] for part in found]).mean() if found else None

    return step


if __name__ == "__main__":
    main(Job.read(sys.argv[1]))
