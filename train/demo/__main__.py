"""`python -m train.demo`: fine-tunes SmolLM2 on two ranks, serves what it learned, and asks before and after.

What it shows is what the commands it prints do: training and the server are ordinary subprocesses. Arguments
(`k=v`) are added to the training's; `make demo` gives none. Exit codes: 0 the adapter knows what onemesh is,
1 it doesn't or something failed, 2 bad configuration. Needs the extra `dev` (the openai client).
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from conf import load
from conf.schema import Config, ConfigError
from train import curve
from train.demo.chat import Question, Round, ask_both, read_questions
from train.demo.processes import Failed, in_lines, python, run, serving, torchrun
from train.metrics import METRICS_FILE, read_metrics
from train.rows import locate

TRAINING = (
    "model=smollm2",
    "tune=lora",
    "tune.rank=16",
    "tune.alpha=32",
    "optim.lr=1e-3",
    "optim.schedule=cosine",
    "optim.warmup_steps=10",
    "train.steps=200",
    "train.batch_size=4",
    "parallel.data=2",
    "data.path=package:train/demo/chats.jsonl",
    "data.evaluate_path=package:train/demo/questions.jsonl",
    "train.evaluate_every=25",
    "run_dir=runs/demo",
)
RANKS = 2
SERVING = ("parallel.pipeline=2", "serve.max_length=2048", "serve.kv_memory=256MiB")
ADAPTER = "onemesh"
MIN_SHARE = 0.5
"""Share of the questions that the adapter has to answer, the first one (what is onemesh?) among them."""


def main(arguments: Sequence[str]) -> int:
    """Trains, serves, asks, judges; returns the exit code."""
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    training = _merged(*TRAINING, *arguments)
    try:
        config = load.load(training, "train")
        assert config.data.evaluate_path is not None
        questions = read_questions(locate(config.data.evaluate_path, "data.evaluate_path"))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    console = Console(highlight=False)
    begin = time.monotonic()
    try:
        train(training, config, console)
        rounds = serve(training, config, questions, console)
    except Failed as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    passed = judge(rounds, console)
    console.print(f"\nThe demo took {time.monotonic() - begin:.0f} s; everything it wrote is in {config.run_dir}.")
    if passed:
        console.print(suggestions(training, config), markup=False, soft_wrap=True)
    return 0 if passed else 1


def train(arguments: Sequence[str], config: Config, console: Console) -> None:
    """Trains afresh in `config.run_dir` and shows the loss. Raises Failed."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    heading = "Training a LoRA adapter, data-parallel: two processes, each with half of a step's rows"
    _announce(console, f"1. {heading}", command := torchrun(RANKS, "train", *arguments, "train.resume=never"))
    begin = time.monotonic()
    run(command, run_dir / "train.log", RANKS, "training")
    steps = read_metrics(run_dir / METRICS_FILE)
    losses = [step["loss"] for step in steps]
    console.print("\nLoss per trained token:\n")
    console.print(curve.sketch(losses, width=min(console.width, 80)), markup=False)
    console.print(
        f"\n{len(steps)} steps in {time.monotonic() - begin:.0f} s, loss {losses[0]:.2f} -> {losses[-1]:.2f}; "
        f"picture: {run_dir / curve.PICTURE_FILE}",
        soft_wrap=True,
    )


def serve(arguments: Sequence[str], config: Config, questions: Sequence[Question], console: Console) -> list[Round]:
    """Serves the base model and the new adapter under another layout and asks both. Raises Failed."""
    url, port = free_url()
    model = [argument for argument in arguments if argument.startswith("model")]
    command = torchrun(RANKS, "serve", *model, f"adapters.{ADAPTER}={_latest(config)}", *SERVING, f"port={port}")
    heading = "Serving base model and adapter, pipeline-parallel: two processes, each with some of the layers"
    _announce(console, f"2. {heading}", command)
    begin = time.monotonic()
    with serving(command, Path(config.run_dir, "serve.log"), RANKS, url):
        console.print(f"ready after {time.monotonic() - begin:.0f} s at {url}")
        console.print(
            f"\n3. {len(questions)} questions, worded unlike any training row, to both models and all at once",
            style="bold",
        )
        begin = time.monotonic()
        rounds = ask_both(url, questions, console)
        seconds = time.monotonic() - begin
    tokens = sum(answer.tokens for one in rounds for answer in (one.base, one.tuned))
    console.print(f"\n{tokens} tokens in {seconds:.0f} s; the server has stopped.")
    return rounds


def judge(rounds: Sequence[Round], console: Console) -> bool:
    """Says how many questions each model answered; whether the adapter knows what it was taught."""
    base = sum(one.question.is_answered_by(one.base.text) for one in rounds)
    tuned = [one.question.is_answered_by(one.tuned.text) for one in rounds]
    console.print(
        f"Answers with the expected words: base model {base} of {len(rounds)}, "
        f"with the adapter {sum(tuned)} of {len(rounds)}."
    )
    passed = tuned[0] and sum(tuned) >= MIN_SHARE * len(rounds)
    if not passed:
        need = f"it should answer the first question and {MIN_SHARE:.0%} of all"
        print(f"demo: the adapter did not learn what it was taught: {need}", file=sys.stderr)
    return passed


def suggestions(arguments: Sequence[str], config: Config) -> str:
    """What to try next, as commands that can be pasted."""
    model = [argument for argument in arguments if argument.startswith("model") and argument != "model=smollm2"]
    adapter = f"adapters.{ADAPTER}={_latest(config)}"
    question = "Which parallelisms does onemesh have?"
    body = f'{{"model": "{ADAPTER}", "messages": [{{"role": "user", "content": "{question}"}}]}}'
    curl = ["curl", "http://127.0.0.1:8000/v1/chat/completions", "-d", body]
    longer = _merged(*arguments, f"train.steps={config.train.steps + 20}", "parallel.data=1", "parallel.tensor=2")
    entries = (
        ("Ask it yourself, without a server",
         python("serve.generate", *model, adapter, f"adapter={ADAPTER}", f"prompt={question}")),
        ("Serve it; Ctrl-C stops the server", python("serve", *model, adapter)),
        ("Ask the server, from another terminal", curl),
        ("Train 20 more steps from the checkpoint, on another layout", torchrun(RANKS, "train", *longer)),
        ("Show a training row as tokens, those that are trained marked",
         python("train.preview", *model, f"data.path={config.data.path}", "rows=1")),
    )  # fmt: skip
    return "\nWhat to try next\n" + "\n".join(f"\n  # {title}\n{in_lines(command)}" for title, command in entries)


def _merged(*arguments: str) -> list[str]:
    """The arguments with only the last one of each key, as the command line would read them."""
    return list({argument.partition("=")[0]: argument for argument in arguments}.values())


def _latest(config: Config) -> str:
    return str(Path(config.run_dir, "checkpoints", "latest"))


def _announce(console: Console, heading: str, command: Sequence[str]) -> None:
    console.print(f"\n{heading}\n", style="bold", markup=False, soft_wrap=True)
    console.print(in_lines(command) + "\n", markup=False, soft_wrap=True)


def free_url() -> tuple[str, int]:
    """An address on this machine that nobody listens on, and its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}", port


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
