"""`python -m train.compare k=v ...`: training beside other trainers, in turn in one run; writes a report.

Ours is `python -m train`, as a user starts it. Everyone trains all weights of the same random model (or an adapter of
it) on the same rows with the same AdamW and the same microbatches, each rank in a process of its own; two ranks have
one thread each, one rank has all cores. Exit codes: 0 done, 1 a contender failed or its losses are off (the report
says which), 2 bad arguments.
"""

from __future__ import annotations

import itertools
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from conf.load import load
from conf.schema import CompareConfig, ConfigError
from kernels.bench import timing
from kernels.machine import commit, processor
from train.compare import launch
from train.compare.cases import (
    LAYOUTS,
    LEARNING_RATE,
    LENGTH,
    LORA_ALPHA,
    LORA_RANK,
    PEERS,
    ROWS,
    SHAPES,
    VIRTUAL_TOKENS,
    Job,
    refusal,
)
from train.compare.inputs import Inputs, write_inputs
from train.compare.report import OURS, Row, tables

DTYPES = ("bfloat16", "float32")


def main(arguments: Sequence[str]) -> int:
    """Measures what the arguments choose and writes the report, again after every row of it."""
    try:
        config = load(arguments, "compare")
        check(config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that contenders are ended too
    python = config.peer_python or sys.executable
    missing = [name for name in config.peers if not launch.importable(python, PEERS[name].package)]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="onemesh-compare-") as folder:
        for shape in config.shapes:
            inputs = write_inputs(Path(folder) / shape, SHAPES[shape])
            for dtype, layout in itertools.product(config.dtypes, config.layouts):
                rows.append(measure_row(config, inputs, Row(shape, dtype, layout), missing))
                out = Path(config.out)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(report(rows, config, arguments))
    problems = [problem for row in rows for problem in row.problems()]
    problems += [f"{row.shape}, {row.dtype}, {row.layout}: {OURS} failed" for row in rows if OURS not in row.measured]
    print(*problems, f"written to {config.out}", sep="\n")
    failed = any(reason.startswith("failed") for row in rows for reason in row.absent.values())
    return 1 if failed or problems else 0


def check(config: CompareConfig) -> None:
    """Raises ConfigError for names that don't exist, and microbatches that don't divide the rows."""
    problems: list[str] = []
    choices = {"shapes": SHAPES, "dtypes": DTYPES, "layouts": LAYOUTS, "peers": PEERS}
    for key, known in choices.items():
        chosen = getattr(config, key)
        problems += [f"{key}={name} is not one of {', '.join(known)}" for name in chosen if name not in known]
        if not chosen and key != "peers":
            problems.append(f"{key}=[] leaves nothing to measure; choose among {', '.join(known)}")
    if ROWS // 2 % config.microbatch_rows:
        problems.append(f"microbatch_rows={config.microbatch_rows} must divide the {ROWS // 2} rows of a data rank")
    if problems:
        raise ConfigError("\n".join(problems))


def gemm_peak(dtype: str) -> float:
    """Operations per second of a square product by oneDNN on all cores, now: the median of a few."""
    product, operations = timing.matrix_product(getattr(torch, dtype))
    return operations / timing.interleaved({"product": product}, repeats=9)["product"]


def measure_row(config: CompareConfig, inputs: Inputs, row: Row, missing: Sequence[str]) -> Row:
    """Fills the row: all contenders in turn, as many rounds as asked."""
    tune = LAYOUTS[row.layout].tune
    contenders = [OURS, *(name for name in config.peers if tune in PEERS[name].tunes)]
    row.absent.update({name: "not installed" for name in contenders if name in missing})
    for number, who in itertools.product(range(config.rounds), contenders):
        if who in row.absent:
            continue
        with tempfile.TemporaryDirectory(prefix="contender-", dir=inputs.model.parent) as folder:
            job = Job(
                model=str(inputs.model),
                ids=str(inputs.ids),
                metrics=str(Path(folder) / "metrics.jsonl"),
                shape=row.shape,
                layout=row.layout,
                dtype=row.dtype,
                microbatch_rows=config.microbatch_rows,
                steps=1 + config.steps,
            )
            reason = None if who == OURS else refusal(job)
            if reason is not None:
                row.absent[who] = reason
                continue
            row.peak = max(row.peak, gemm_peak(row.dtype))
            command = ours(job, inputs) if who == OURS else theirs(job, config.peer_python, who, Path(folder))
            try:
                found = launch.measure(command, job.ways.ranks, Path(job.metrics), job.steps, Path(folder))
            except launch.Failed as error:
                row.measured.pop(who, None)
                row.absent[who] = f"failed: {error}"
                print(f"{row.shape} {row.dtype} {row.layout} {who}: {error}", flush=True)
                continue
        row.measured.setdefault(who, []).append(found)
        shown = f"{row.speed(who):.0f} tokens/s, losses {', '.join(f'{loss:.4f}' for loss in found.losses)}"
        print(f"{row.shape} {row.dtype} {row.layout} {who} (round {number + 1}): {shown}", flush=True)
    return row


def ours(job: Job, inputs: Inputs) -> list[str]:
    """The command that a user would start on each rank."""
    ways, run_dir = job.ways, Path(job.metrics).parent
    tune = {
        "full": [],
        "lora": [f"tune.rank={LORA_RANK}", f"tune.alpha={LORA_ALPHA}"],
        "prefix": [f"tune.virtual_tokens={VIRTUAL_TOKENS}"],
    }
    return [
        *(sys.executable, "-m", "train", "model=hf", f"model.path={inputs.model}", f"model.dtype={job.dtype}"),
        *(f"tune={ways.tune}", *tune[ways.tune]),
        *(f"data.path={inputs.rows}", f"data.max_length={LENGTH}", "data.loss_on=all"),
        *(f"train.batch_size={ROWS}", f"train.steps={job.steps}", f"run_dir={run_dir}"),
        *(f"optim.lr={LEARNING_RATE}", "optim.clip_norm=null"),
        *(f"parallel.data={ways.data}", f"parallel.pipeline={ways.pipeline}", f"parallel.tensor={ways.tensor}"),
        f"parallel.microbatches={job.microbatches}",
    ]


def theirs(job: Job, python: str | None, who: str, folder: Path) -> list[str]:
    """The command of a peer; its job goes to `folder`."""
    job.write(folder / "job.json")
    return [python or sys.executable, "-m", f"train.compare.{PEERS[who].module}", str(folder / "job.json")]


def report(rows: Sequence[Row], config: CompareConfig, arguments: Sequence[str]) -> str:
    """The page."""
    python = config.peer_python or sys.executable
    named = dict.fromkeys(["torch", *(PEERS[name].distribution for name in config.peers), "transformers"])
    shown = [argument for argument in arguments if not argument.startswith(("peer_python=", "out="))]
    return "\n".join(
        [
            "# Training beside other trainers",
            "",
            f"{date.today()}, {processor()}, {torch.get_num_threads()} cores, "
            f"{', '.join(launch.versions(python, list(named)))}, commit {commit()}.",
            f"A step is {ROWS} rows of {LENGTH} tokens, {config.microbatch_rows} per microbatch: forward, backward,",
            f"AdamW. Median (slowest-fastest) of {config.rounds * config.steps} steps after a warm-up, contenders in "
            f"turn, {config.rounds} round{'s' * (config.rounds > 1)}.",
            "Weights, rows and AdamW are the same for all; losses are checked to start equal and to fall.",
            "",
            f"Command: `{shlex.join(['python', '-m', 'train.compare', *shown])}`",
            "",
            tables(rows),
            "",
            NOTES,
        ]
    )


NOTES = f"""## What is compared

- `single`: one process with a thread per core; `data`, `tensor`, `pipeline` (1F1B): two ranks, one thread each. `lora`
  (rank {LORA_RANK}, all linears) and `prefix` (P-tuning v2, {VIRTUAL_TOKENS} virtual tokens): one process.
- onemesh is `python -m train`, saving included in neither time nor memory. Trained weights and moments are float32.
- Megatron-core is made for GPUs: `train/compare/megatron_on_cpu.py` answers its CUDA calls for the CPU. With data
  parallelism it, PyTorch and DeepSpeed shard AdamW's moments (ZeRO-1), which onemesh doesn't.
- In bfloat16, PyTorch computes under autocast over float32 weights; Megatron-core and DeepSpeed keep bfloat16 weights
  with float32 masters; PEFT has a frozen bfloat16 base. PyTorch's pipeline trains an untied head.
- GEMM peak: a square product by oneDNN on all cores, taken before each contender, the fastest of the row; the share
  counts the matrix products of our step against all of its time.
- Memory: anonymous is heap and shared memory, sampled every {launch.SAMPLE_S * 1000:.0f} ms; resident also has files
  such as libraries.
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
