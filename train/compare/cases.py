"""What is measured: model shapes, layouts, and who takes part in which. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from conf.schema import Architecture

ROWS, LENGTH = 8, 512
"""Rows of a step, and their tokens. A row's last token predicts nothing."""
TOKENS = ROWS * LENGTH
LEARNING_RATE = 3e-4
VIRTUAL_TOKENS, LORA_RANK, LORA_ALPHA = 20, 8, 16
"""Of P-tuning v2's prefix; of LoRA on all seven linears."""

SHAPES: Mapping[str, Architecture] = MappingProxyType(
    {
        name: Architecture(
            num_layers=layers,
            width=width,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=width // heads,
            ffn_width=ffn,
            vocab_size=vocab,
            max_positions=2048,
            tied_embeddings=True,
        )
        for name, layers, width, heads, kv_heads, ffn, vocab in (
            ("small", 12, 768, 12, 4, 2048, 32768),
            ("smol", 30, 576, 9, 3, 1536, 49152),  # SmolLM2-135M
            ("tiny", 2, 64, 4, 2, 128, 512),  # says whether everything works, nothing about speed
        )
    }
)


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks, and what of it is trained."""

    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    tune: str = "full"

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.data * self.pipeline * self.tensor


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "single": Layout(),
        "data": Layout(data=2),
        "tensor": Layout(tensor=2),
        "pipeline": Layout(pipeline=2),
        "lora": Layout(tune="lora"),
        "prefix": Layout(tune="prefix"),
    }
)


@dataclass(frozen=True)
class Peer:
    """Another trainer: `python -m train.compare.<module> job.json` runs it where `package` can be imported."""

    title: str
    module: str
    package: str
    distribution: str
    tunes: tuple[str, ...]


_FULL = ("full",)
PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        "megatron": Peer("Megatron-core", "peer_megatron", "megatron.core", "megatron-core", _FULL),
        "torch": Peer("PyTorch", "peer_torch", "torch", "torch", _FULL),
        "deepspeed": Peer("DeepSpeed", "peer_deepspeed", "deepspeed", "deepspeed", _FULL),
        "peft": Peer("PEFT", "peer_peft", "peft", "peft", ("lora", "prefix")),
    }
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One contender's work; peers read it from a file."""

    model: str
    """Hugging Face directory with the initial weights, in float32."""
    ids: str
    """Safetensors file: `ids`, int64 [ROWS, LENGTH], the rows of every step."""
    metrics: str
    """Where a line per step goes: step, loss, tokens, tokens_per_second."""
    shape: str
    layout: str
    dtype: str
    """`bfloat16` or `float32`: the type of the computation."""
    microbatch_rows: int
    steps: int
    """Steps in all, with the warm-up."""

    @property
    def architecture(self) -> Architecture:
        """The model's shape."""
        return SHAPES[self.shape]

    @property
    def ways(self) -> Layout:
        """The degrees of the layout."""
        return LAYOUTS[self.layout]

    @property
    def microbatches(self) -> int:
        """Of a data rank and step."""
        return ROWS // self.ways.data // self.microbatch_rows

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: str) -> Job:
        """What `write` wrote."""
        return Job(**json.loads(Path(path).read_text()))


def refusal(job: Job) -> str | None:
    """Why peers can't run the layout on this shape, None when they can; ours can run all of them."""
    shape, ways = job.architecture, job.ways
    for name, count in (("heads", shape.num_heads), ("KV heads", shape.num_kv_heads)):
        if count % ways.tensor:
            return f"can't: {count} {name} on {ways.tensor} ranks"
    return None


def flops(shape: Architecture, ways: Layout) -> float:
    """Floating-point operations of a step's matrix products, forward and backward.

    Two per weight and token forward, two for the gradient of the input and two for that of a trained weight; causal
    attention counts the half of the square that it needs (arXiv:2205.05198, appendix A), a prefix as further keys.
    What LoRA's small factors add isn't counted.
    """
    heads = shape.num_heads * shape.head_dim
    attention = shape.width * 2 * (heads + shape.num_kv_heads * shape.head_dim)
    weights = shape.num_layers * (attention + 3 * shape.width * shape.ffn_width) + shape.vocab_size * shape.width
    keys = LENGTH / 2 + (VIRTUAL_TOKENS if ways.tune == "prefix" else 0)
    per_weight = 6 if ways.tune == "full" else 4
    return TOKENS * (per_weight * weights + 12 * shape.num_layers * heads * keys)
