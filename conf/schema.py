"""Every option of every command: frozen dataclasses, each field with a type, a default and a line about it.

A command's tree is `ROOTS[command]`; a command-line key is the path of an attribute in it. Nothing writes to
a config after loading: `conf.check` returns a new one in which "auto" and each None that stands for a derived
value are resolved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from conf.option import ABOVE_0, FROM_0, FROM_1, SET, about, option


class ConfigError(ValueError):
    """A mistake of the user's: `field=value`, the rule it breaks, what to set instead. A line per problem."""


# Values that are planned and that this version does not have: refused as "not available yet", not as unknown.
PLANNED: Mapping[str, tuple[str, ...]] = {
    "tune": ("qlora", "prompt", "ptuning", "adapter", "ia3"),
    "optim": ("deepspeed",),
    "parallel.schedule": ("pipedream",),
    "schedule": ("pipedream",),
}

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears of a decoder layer, by the names that PEFT's `target_modules` uses."""

TRAINING, SERVING = ("train", "preview", "submit"), ("serve", "generate")
"""The commands that read the options of a training run, and those that run the engine."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context. Fields unused by a kind stay None."""

    kind: Literal["linear", "llama3", "yarn"] = field(metadata=about("Scaling rule."))
    factor: float = field(metadata=about("Stretch of the context, >= 1.", FROM_1))
    original_max_positions: int | None = option(None, "Context before the stretch, in tokens.")
    low_freq_factor: float | None = option(None, "llama3: wavelengths above original/low are scaled fully.")
    high_freq_factor: float | None = option(None, "llama3: wavelengths below original/high are not scaled.")
    beta_fast: float | None = option(None, "yarn: rotations at which extrapolation ends.")
    beta_slow: float | None = option(None, "yarn: rotations at which interpolation begins.")
    attention_factor: float | None = option(None, "yarn: factor on cos and sin; None = derived.")
    mscale: float | None = option(None, "yarn: weight of the attention factor's logarithm.")
    mscale_all_dim: float | None = option(None, "yarn: the same for the divisor.")
    truncate: bool | None = option(None, "yarn: round the borders of the ramp to whole dimensions.")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape of a decoder. Llama, SmolLM2, Mistral, Qwen 2 and 3, XVERSE, Gemma 2 and 3, ChatGLM 2 and 3, GLM-4 and
    Baichuan are values of it."""

    num_layers: int = field(metadata=about("Decoder layers.", FROM_1))
    width: int = field(metadata=about("Width of the residual stream (D).", FROM_1))
    num_heads: int = field(metadata=about("Query heads (N).", FROM_1))
    num_kv_heads: int = field(metadata=about("Key/value heads (K); divides num_heads.", FROM_1))
    head_dim: int = field(metadata=about("Width of a head (H); even.", FROM_1))
    ffn_width: int = field(metadata=about("Inner width of the feed-forward (F).", FROM_1))
    vocab_size: int = field(metadata=about("Rows of the embedding (V).", FROM_1))
    max_positions: int = field(metadata=about("Longest context, in tokens.", FROM_1))
    norm_eps: float = option(1e-5, "Epsilon of the RMS norms.", FROM_0)
    rope_theta: float = option(10000.0, "Base of the rotary frequencies.", ABOVE_0)
    rope_scaling: RopeScaling | None = option(None, "Stretch of the rotary frequencies.")
    qkv_bias: bool = option(False, "q_proj, k_proj and v_proj have a bias.")
    output_bias: bool = option(False, "o_proj has a bias.")
    mlp_bias: bool = option(False, "gate_proj, up_proj and down_proj have a bias.")
    tied_embeddings: bool = option(False, "The head is the embedding.")
    sliding_window: int | None = option(None, "Tokens a query sees, itself included; None = all.", FROM_1)
    window_layers: tuple[bool, ...] | None = option(
        None, "Layers that use the window; None = every layer.", needs=("sliding_window", (SET,))
    )
    window_rope_theta: float | None = option(
        None,
        "Base of the rotary frequencies in layers with the window, unscaled there; None = rope_theta.",
        ABOVE_0,
        needs=("sliding_window", (SET,)),
    )
    rotary_dim: int | None = option(None, "First dimensions of a head, which rotary turns; None = all.", "[2,inf)")
    rotary_interleaved: bool = option(False, "Rotary turns neighbouring dimensions, not those half a width apart.")
    alibi: bool = option(False, "Scores fall with the distance (ALiBi); no rotary embedding.")
    normalised_head: bool = option(False, "The rows of the head are scaled to length 1 (Baichuan 2).")
    activation: Literal["silu", "gelu_tanh"] = option("silu", "Activation of the gate.")
    qk_norm: bool = option(False, "Each head's query and key pass an RMS norm before rotary.")
    post_norms: bool = option(False, "What attention and feed-forward give passes an RMS norm before it is added.")
    norm_offset: bool = option(False, "Norms multiply by 1 + their weight.")
    embedding_scale: float = option(1.0, "Factor on the embedding's output.", ABOVE_0)
    attention_scalar: float | None = option(None, "Scores are divided by its root; None = head_dim.", ABOVE_0)
    score_cap: float | None = option(None, "Scores s become cap * tanh(s / cap).", ABOVE_0)
    logit_cap: float | None = option(None, "Logits l become cap * tanh(l / cap).", ABOVE_0)

    @property
    def score_scale(self) -> float:
        """Factor on the products of queries and keys."""
        return (self.attention_scalar or self.head_dim) ** -0.5


@dataclass(frozen=True, kw_only=True)
class ModelConf:
    """Which weights, and the type they are computed in."""

    path: str = option("", "HF directory, .gguf file, package:<name>/<file> or hub id; empty = random.")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = option("bfloat16", "Computation type.")
    architecture: Architecture | None = option(None, "Shape of a random model; None = read from the path.")
    seed: int = option(0, "Seed of a random model's weights.", FROM_0, needs=("path", ("",)))

    @property
    def name(self) -> str:
        """Base name of the model: last part of the path without `.gguf`, `tiny` for a random one."""
        return Path(self.path).absolute().name.removesuffix(".gguf") if self.path else "tiny"


@dataclass(frozen=True, kw_only=True)
class ParallelConf:
    """The layout: degrees of the mesh axes, and what goes with them."""

    data: int | None = option(None, "Data-parallel degree; default: training the ranks left over, serving 1.", FROM_1)
    pipeline: int = option(1, "Pipeline stages.", FROM_1)
    context: int = option(1, "Context-parallel degree: ranks that share the tokens of a pack.", FROM_1)
    tensor: int | None = option(
        None, "Tensor-parallel degree; default: training 1, serving the ranks left over.", FROM_1
    )
    stages: Literal["auto"] | tuple[int, ...] = option(
        "auto", "Layers of each (virtual) stage, as [8,7,7,8]; auto balances weights.", FROM_1
    )
    sequence: bool = option(
        False, "Sequence parallelism: tensor ranks share the tokens between their linears.", only=TRAINING
    )
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"] = option(
        "1f1b", "Pipeline schedule.", only=TRAINING
    )
    virtual_stages: int | None = option(
        None, "Chunks of layers per rank; default 1, with interleaved and zbv 2.", FROM_1, only=TRAINING
    )
    context_method: Literal["ring", "all_gather", "ulysses"] = option(
        "ring", "Attention across context ranks.", only=TRAINING
    )
    ulysses: int | None = option(
        None,
        "Context ranks that swap tokens for heads; the rest of the degree are rings; default: all of them.",
        FROM_1,
        needs=("context_method", ("ulysses",)),
        only=TRAINING,
    )
    recompute: Literal["none", "selective", "full"] = option(
        "none", "Activations recomputed in backward instead of kept.", only=TRAINING
    )
    trace: bool = option(False, "Write when each pass of a pipeline ran, to run_dir/trace.", only=TRAINING)
    microbatches: int | None = option(
        None,
        "Microbatches per data rank and step; default 1, with a pipeline 2 x stages.",
        FROM_1,
        only=TRAINING,
    )

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(data, pipeline, context, tensor) of a checked config."""
        assert self.data is not None and self.tensor is not None, "sizes of an unchecked ParallelConf"
        return self.data, self.pipeline, self.context, self.tensor

    @property
    def ulysses_size(self) -> int:
        """Context ranks that swap tokens for heads; 1 with another method."""
        return (self.ulysses or self.context) if self.context_method == "ulysses" else 1


@dataclass(frozen=True, kw_only=True)
class TuneConf:
    """What is trained: all weights, or an adapter."""

    kind: Literal["full", "lora", "prefix"] = option("full", "What is trained.")
    rank: int = option(8, "Rank of the factors.", FROM_1, needs=("kind", ("lora",)))
    alpha: float = option(16.0, "The update is scaled by alpha / rank.", ABOVE_0, needs=("kind", ("lora",)))
    dropout: float = option(0.0, "Dropout on the adapter's input.", "[0,1)", needs=("kind", ("lora",)))
    targets: tuple[str, ...] = option(LINEARS, "Linears that get an adapter.", needs=("kind", ("lora",)))
    virtual_tokens: int = option(20, "Length of the prefix, in tokens.", FROM_1, needs=("kind", ("prefix",)))
    prefix_projection: bool = option(False, "Train the prefix through an MLP.", needs=("kind", ("prefix",)))
    prefix_hidden: int | None = option(
        None,
        "Inner width of that MLP; default: the model's width.",
        FROM_1,
        needs=("prefix_projection", (True,)),
    )


@dataclass(frozen=True, kw_only=True)
class DataConf:
    """The rows, and how they become tokens."""

    path: str = option("", "JSONL file or JSON array of rows.")
    max_length: int | None = option(None, "Tokens of a row; default: the model's context, at most 2048.", "[2,inf)")
    too_long: Literal["truncate", "drop", "error"] = option("truncate", "What happens to longer rows.")
    loss_on: Literal["assistant", "last", "all"] = option("assistant", "Tokens that are trained.")
    packing: bool = option(True, "Rows of a microbatch go through the model in one piece.")
    evaluate_path: str | None = option(None, "Rows for validation, in a file of their own.")
    evaluate_fraction: float = option(0.0, "Share of data.path held out for validation, every k-th row.", "[0,0.5]")

    @property
    def evaluate_stride(self) -> int | None:
        """k: rows k-1, 2k-1, ... of `path` are held out for validation; None when nothing is."""
        return round(1 / self.evaluate_fraction) if self.evaluate_fraction else None


@dataclass(frozen=True, kw_only=True)
class OptimConf:
    """AdamW and the learning rate over time."""

    kind: Literal["adamw", "zero1"] = option("adamw", "AdamW; zero1 keeps its state shared out over the replicas.")
    lr: float = option(1e-4, "Peak learning rate.", FROM_0)
    weight_decay: float = option(0.0, "Decoupled weight decay.", FROM_0)
    betas: tuple[float, float] = option((0.9, 0.999), "Decay of the two moments.", "[0,1)")
    eps: float = option(1e-8, "Added to the root of the second moment.", ABOVE_0)
    clip_norm: float | None = option(1.0, "Bound on the global gradient norm; null = none.", ABOVE_0)
    schedule: Literal["constant", "linear", "cosine"] = option("constant", "Learning rate after the warm-up.")
    warmup_steps: int = option(0, "Step s <= this uses lr * s / warmup_steps.", FROM_0)
    decay_steps: int | None = option(
        None,
        "Step at which the decay ends; default: train.steps.",
        FROM_1,
        needs=("schedule", ("linear", "cosine")),
    )
    min_lr: float = option(
        0.0,
        "Learning rate at the end of the decay and after it.",
        FROM_0,
        needs=("schedule", ("linear", "cosine")),
    )


@dataclass(frozen=True, kw_only=True)
class TrainConf:
    """The run."""

    steps: int = option(100, "Stop after this step; steps count from 1.", FROM_1)
    batch_size: int = option(8, "Rows per step over all ranks.", FROM_1)
    seed: int = option(0, "Order of the rows, initial values of adapters, dropout.", FROM_0)
    save_every: int = option(0, "Steps between checkpoints; 0 = only after the last step.", FROM_0)
    keep_checkpoints: int | None = option(None, "Newest checkpoints that stay; default: all.", FROM_1)
    evaluate_every: int = option(0, "Steps between evaluations; 0 = only after the last step.", FROM_0)
    resume: str = option("auto", "auto (newest checkpoint of run_dir, if any), never, or a checkpoint's path.")


MEMORY_UNITS: Mapping[str, int] = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def memory_bytes(value: str | int | float, available: int) -> int:
    """Bytes meant by `2GiB`, `500MB`, `1000000`, or by a share of `available` such as 0.25 (0 < x <= 1).

    Raises:
        ConfigError: neither.
    """
    text = str(value).strip().lower()
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text[len(digits) :].strip()
    try:
        number = float(digits)
    except ValueError:
        number = -1.0
    if unit not in MEMORY_UNITS or not 0 < number < float("inf"):
        raise ConfigError(f"{value} is no amount of memory; use bytes (2GiB, 500MB, 1000000) or a share (0.25)")
    if not unit and number <= 1:
        return int(number * available)
    return int(number * MEMORY_UNITS[unit])


@dataclass(frozen=True, kw_only=True)
class ServeConf:
    """The engine, and what its server offers."""

    model_name: str = option("", "Name in /v1/models; default: the model's base name.", only=("serve",))
    max_length: int | None = option(None, "Prompt plus answer, in tokens; default: the model's context.", "[2,inf)")
    page_size: int = option(16, "Tokens of a page of the KV cache.", FROM_1)
    kv_memory: str | int | float = option(0.25, "KV cache per rank: bytes (2GiB) or share of free memory.")
    max_batch_tokens: int = option(2048, "Tokens computed in one engine step.", FROM_1)
    max_sequences: int = option(64, "Requests running at once.", FROM_1)
    api_key: str | None = option(None, "Bearer token clients must send.", only=("serve",), secret=True)
    watch: str | None = option(None, "Run directory whose new checkpoints are served.", only=("serve",), later=True)


@dataclass(frozen=True, kw_only=True)
class LoggerConf:
    """Where metrics go besides metrics.jsonl."""

    kind: Literal["none", "wandb"] = option("none", "Tracker.")
    project: str = option("onemesh", "Project of the run.", needs=("kind", ("wandb",)))
    name: str = option("", "Name of the run; default: the last part of run_dir.", needs=("kind", ("wandb",)))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a command was told; sections that it does not read keep their defaults."""

    model: ModelConf = option(ModelConf(), "Model.")
    parallel: ParallelConf = option(ParallelConf(), "Layout.")
    tune: TuneConf = option(TuneConf(), "What is trained.", only=TRAINING)
    data: DataConf = option(DataConf(), "Rows.", only=TRAINING)
    optim: OptimConf = option(OptimConf(), "Optimizer.", only=TRAINING)
    train: TrainConf = option(TrainConf(), "Run.", only=TRAINING)
    serve: ServeConf = option(ServeConf(), "Engine and server.", only=SERVING)
    logger: LoggerConf = option(LoggerConf(), "Tracker.", only=TRAINING)
    run_dir: str = option("", "Where a run writes; default: runs/<model>-<tune>.", only=TRAINING)
    host: str = option("127.0.0.1", "Address the server listens on.", only=("serve",))
    port: int = option(8000, "Port the server listens on; 0 = a free one.", "[0,65535]", only=("serve",))
    adapters: Mapping[str, str] = field(
        default_factory=dict, metadata=about("Adapters to serve: adapters.<name>=<directory>.", only=SERVING)
    )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Config):
    """`serve.generate`: the engine's options, what to say and how to draw."""

    prompt: str | None = option(None, "One prompt, taken as it is.")
    prompts: str | None = option(None, 'JSONL file: {"prompt": text} or {"messages": [...]} per line.')
    adapter: str | None = option(None, "Name (of adapters) to answer with; default: the base model.")
    chat: bool = option(True, "Wrap the prompt in the chat template.")
    max_tokens: int = option(128, "Longest answer, in tokens.", FROM_1)
    temperature: float = option(0.0, "0 = greedy.", FROM_0)
    top_k: int = option(0, "Draw among the k likeliest tokens; 0 = all.", FROM_0)
    top_p: float = option(1.0, "Draw among the likeliest tokens that hold this share.", "(0,1]")
    min_p: float = option(0.0, "Drop tokens below this share of the likeliest one's probability.", "[0,1]")
    repetition_penalty: float = option(1.0, "Divides the logits of tokens seen before; 1 = none.", ABOVE_0)
    seed: int = option(0, "Seed of the draws.", FROM_0)
    ignore_eos: bool = option(False, "Go on after the end-of-text token.")
    out: str | None = option(None, "JSONL file for the answers; default: standard output.")


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(Config):
    """`train.preview`: a training run's options, so that its command line can be previewed as it is."""

    rows: int = option(3, "Rows shown.", FROM_1)


@dataclass(frozen=True, kw_only=True)
class SubmitConfig(Config):
    """`slurm.submit`: a training run's options and the job's."""

    nodes: int | None = option(None, "Nodes of the job; default: as few as hold the layout's ranks.", FROM_1)
    partition: str | None = option(None, "Partition; default: the cluster's.")
    time: str = option("01:00:00", "Time limit as Slurm spells it.")
    account: str | None = option(None, "Account that is charged.")
    dry_run: bool = option(False, "Print the job instead of sending it.")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """`serve.bench`, the load generator."""

    url: str = option("http://127.0.0.1:8000", "Server under load.")
    model: str = option("", "Name of the model asked; default: the first one served.")
    api_key: str | None = option(None, "Bearer token to send.", secret=True)
    requests: int = option(32, "Requests sent; with a trace, its first ones.", FROM_1)
    rate: float | None = option(
        None, "Requests per second at fixed gaps; default: all at once.", ABOVE_0, needs=("trace", (None,))
    )
    input_tokens: int = option(256, "Tokens of a prompt.", FROM_1, needs=("trace", (None,)))
    output_tokens: int = option(128, "Tokens of an answer.", FROM_1, needs=("trace", (None,)))
    trace: str | None = option(None, "Trace file (.csv or .jsonl) with arrival times and lengths.")
    time_scale: float = option(1.0, "Factor on the trace's times.", ABOVE_0, needs=("trace", (SET,)))
    length_scale: float = option(1.0, "Factor on the trace's lengths.", ABOVE_0, needs=("trace", (SET,)))
    seed: int = option(0, "Seed of the prompts' text.", FROM_0)
    out: str | None = option(None, "JSON file for the report.")


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """`parallel.pipeline.show`."""

    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "auto"] = option(
        "1f1b", "Schedule drawn; auto: the fastest for these times.", needs=("file", (None,))
    )
    stages: int = option(4, "Pipeline stages.", FROM_1, needs=("file", (None,)))
    microbatches: int = option(8, "Microbatches.", FROM_1, needs=("file", (None,)))
    chunks: int | None = option(
        None,
        "Chunks of layers (virtual stages) per rank; default: the fewest of the schedule; with auto the most, 4.",
        FROM_1,
        needs=("file", (None,)),
    )
    most_in_flight: float | None = option(
        None, "Microbatches whose activations a rank may keep.", ABOVE_0, needs=("schedule", ("auto",))
    )
    file: str | None = option(None, "Schedule to draw, as out=<name>.txt writes it.")
    trace: str | None = option(None, "Run directory: its last step, trained with parallel.trace=true, beside its plan.")
    forward: float = option(1.0, "Time of the forward through a rank's layers.", ABOVE_0)
    input: float = option(1.0, "Time of the gradient of their input.", FROM_0)
    weight: float = option(1.0, "Time of the gradients of their weights.", FROM_0)
    message: float = option(0.0, "Time until a result is at another rank.", FROM_0)
    out: str | None = option(None, "Picture (.svg, .png) or schedule file (.txt); default: the terminal.")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """`train.compare`: which part of the comparison is measured."""

    shapes: tuple[str, ...] = option(("small",), "Models: small, smol (SmolLM2-135M's shape), tiny (a trial).")
    dtypes: tuple[str, ...] = option(("bfloat16", "float32"), "Computation types.")
    layouts: tuple[str, ...] = option(
        ("single", "data", "tensor", "pipeline", "lora", "prefix"), "Layouts of two ranks, and adapters on one."
    )
    peers: tuple[str, ...] = option(("megatron", "torch", "deepspeed", "peft"), "Who takes part besides ours.")
    peer_python: str | None = option(None, "Interpreter that has the peers; default: the one that runs this.")
    microbatch_rows: int = option(1, "Rows of a microbatch, for everyone.", FROM_1)
    steps: int = option(2, "Steps measured in a round, after a warm-up step.", FROM_1)
    rounds: int = option(1, "Rounds in which everyone runs once.", FROM_1)
    out: str = option("docs/benchmarks/training.md", "Markdown file for the report.")


ROOTS: Mapping[str, type] = {
    "train": Config,
    "serve": Config,
    "preview": PreviewConfig,
    "submit": SubmitConfig,
    "generate": GenerateConfig,
    "bench": BenchConfig,
    "show": ShowConfig,
    "compare": CompareConfig,
}
"""The class of each command's configuration."""
