"""The load generator: python -m serve.bench url=http://127.0.0.1:8000 requests=64 input_tokens=256 output_tokens=128

Sends completions with prompts and answers of given lengths, all at once, at a fixed rate (rate=2.5) or as in a
trace (trace=<file>), streams them, and prints what a user would have felt and what the server achieved:

    time to first token   from the moment a request was due to its first piece of text
    inter-token latency   from one piece of text of a request to the next
    throughput            tokens of all prompts and answers over the whole time

A late client counts against the server, as it would for a user. The load goes to this machine or its private
network only. Any server with OpenAI's /v1/completions, vLLM's ignore_eos and /tokenize can be asked.
"""

import asyncio
import gc
import ipaddress
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from conf.load import load
from conf.schema import BenchConfig, ConfigError
from serve.arrivals import Arrival, plan
from serve.sse import HttpError, Server

MOST_REQUESTS = 100_000
LONGEST_RUN = 3600.0
"""Seconds after which whatever still runs is given up."""

WORDS = (
    "The old harbour town wakes slowly: fishermen carry nets over wet stones, a baker opens blue shutters, and "
    "somewhere above the roofs 27 bells begin to argue about the hour. Nobody here has ever agreed on the time."
)
"""Text whose tokens, in random order, are the prompts."""


@dataclass(kw_only=True)
class Outcome:
    """What happened to one request; times are seconds."""

    due: float
    pieces: list[float] = field(default_factory=list[float])
    """When text came."""
    end: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    def note(self, event: Mapping[str, Any]) -> None:
        """Takes one event of the stream. Raises LookupError or TypeError for one that isn't OpenAI's."""
        if event["choices"] and event["choices"][0]["text"]:
            self.pieces.append(time.perf_counter())
        if event.get("usage"):
            self.input_tokens = event["usage"]["prompt_tokens"]
            self.output_tokens = event["usage"]["completion_tokens"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """The server, the model asked there, its context, and token ids to make prompts of."""

    server: Server
    model: str
    max_length: int | None
    ids: Sequence[int]


async def find_target(config: BenchConfig) -> Target:
    """Asks the server what it serves.

    Raises:
        ConfigError: the url isn't local or nobody answers there, or the model isn't served.
    """
    try:
        server = Server.at(config.url, config.api_key)
        _check_local(server.host)
    except (ValueError, OSError) as error:
        raise ConfigError(f"url={config.url} {error}") from error
    try:
        cards: list[dict[str, Any]] = (await server.get("/v1/models"))["data"]
        names = [card["id"] for card in cards]
        model = config.model or names[0]
        if model not in names:
            raise ConfigError(f"model={model} is not served at {config.url}; there is {', '.join(names)}")
        ids = (await server.post("/tokenize", {"model": model, "prompt": WORDS}))["tokens"]
    except (HttpError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"url={config.url} doesn't answer as an OpenAI server does: {error}") from error
    card = cards[names.index(model)]
    return Target(server=server, model=model, max_length=card.get("max_model_len"), ids=ids)


def _check_local(host: str) -> None:
    """Raises ValueError unless every address of `host` is this machine's or private."""
    for *_, address in socket.getaddrinfo(host, None):
        parsed = ipaddress.ip_address(str(address[0]).split("%")[0])
        if not (parsed.is_loopback or parsed.is_private):
            raise ValueError(f"is at {parsed}: load goes to this machine or a private network only")


async def run(target: Target, arrivals: Sequence[Arrival], seed: int) -> tuple[list[Outcome], float]:
    """Sends every request when it is due. Returns what happened and the seconds it took in all."""
    start = time.perf_counter()
    outcomes = [Outcome(due=start + arrival.time) for arrival in arrivals]
    requests = [
        asyncio.create_task(_request(target, arrival, outcome, random.Random(f"{seed} {index}")))
        for index, (arrival, outcome) in enumerate(zip(arrivals, outcomes, strict=True))
    ]
    _, late = await asyncio.wait(requests, timeout=LONGEST_RUN)
    for task in late:
        task.cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    return outcomes, time.perf_counter() - start


async def _request(target: Target, arrival: Arrival, outcome: Outcome, rng: random.Random) -> None:
    """Sends one request when it is due and notes when its text comes."""
    outcome.error = f"not finished after {LONGEST_RUN:.0f} s"
    await asyncio.sleep(outcome.due - time.perf_counter())
    body = {
        "model": target.model,
        "prompt": rng.choices(target.ids, k=arrival.input_tokens),
        "max_tokens": arrival.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        await target.server.stream("/v1/completions", body, outcome.note)
        outcome.error = None
    except (HttpError, LookupError, TypeError) as error:
        outcome.error = str(error) or type(error).__name__
    outcome.end = time.perf_counter()


def fit(arrivals: Sequence[Arrival], max_length: int | None) -> tuple[list[Arrival], int]:
    """The requests with lengths cut to the model's context, and how many had to be cut."""
    if max_length is None:
        return list(arrivals), 0
    fitted: list[Arrival] = []
    for arrival in arrivals:
        output = min(arrival.output_tokens, max_length - 1)
        prompt = min(arrival.input_tokens, max_length - output)
        fitted.append(Arrival(time=arrival.time, input_tokens=prompt, output_tokens=output))
    return fitted, sum(a != b for a, b in zip(arrivals, fitted, strict=True))


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` of the sorted values lie below, between neighbours linearly; None of none."""
    if not values:
        return None
    position = share * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """The figures of a run: counts, latencies in seconds, tokens per second."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    spoken = [outcome for outcome in good if outcome.pieces]
    gaps = [b - a for outcome in spoken for a, b in zip(outcome.pieces, outcome.pieces[1:], strict=False)]
    tokens_in = sum(outcome.input_tokens for outcome in good)
    tokens_out = sum(outcome.output_tokens for outcome in good)
    return {
        "requests": len(outcomes),
        "errors": Counter(outcome.error for outcome in outcomes if outcome.error is not None),
        "seconds": seconds,
        "input_tokens": tokens_in,
        "output_tokens": tokens_out,
        "input_tokens_per_second": tokens_in / seconds,
        "output_tokens_per_second": tokens_out / seconds,
        "requests_per_second": len(good) / seconds,
        "first_token": _spread([outcome.pieces[0] - outcome.due for outcome in spoken]),
        "inter_token": _spread(gaps),
        "request": _spread([outcome.end - outcome.due for outcome in good]),
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    mean = sum(ordered) / len(ordered) if ordered else None
    return {"mean": mean, **{f"p{share}": quantile(ordered, share / 100) for share in (50, 90, 99)}}


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text."""
    errors = sum(figures["errors"].values())
    lines = [
        f"{figures['requests']} requests in {figures['seconds']:.2f} s, {errors} of them failed",
        *(f"  {count} x {message}" for message, count in figures["errors"].items()),
        "",
        f"{'milliseconds':<22}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}",
    ]
    for name, title in (
        ("first_token", "time to first token"),
        ("inter_token", "inter-token latency"),
        ("request", "whole request"),
    ):
        cells = ("-" if value is None else f"{value * 1000:.1f}" for value in figures[name].values())
        lines.append(f"{title:<22}" + "".join(f"{cell:>10}" for cell in cells))
    lines += [
        "",
        f"{'throughput':<22}{'tokens':>10}{'tokens/s':>10}",
        f"{'prompts':<22}{figures['input_tokens']:>10}{figures['input_tokens_per_second']:>10.1f}",
        f"{'answers':<22}{figures['output_tokens']:>10}{figures['output_tokens_per_second']:>10.1f}",
    ]
    return "\n".join(lines)


async def bench(config: BenchConfig) -> int:
    """Runs the load that `config` describes and reports. Returns the exit code: 1 if no request succeeded."""
    if config.requests > MOST_REQUESTS:
        raise ConfigError(f"requests={config.requests} must be at most {MOST_REQUESTS}")
    arrivals = plan(config)
    target = await find_target(config)
    gc.freeze()  # collections during the load skip what was imported
    arrivals, num_cut = fit(arrivals, target.max_length)
    if num_cut:
        print(f"{num_cut} requests were cut to the model's context of {target.max_length} tokens")
    outcomes, seconds = await run(target, arrivals, config.seed)
    figures = {"url": config.url, "model": target.model, "cut": num_cut, **summary(outcomes, seconds)}
    print(table(figures))
    if config.out is not None:
        Path(config.out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if any(outcome.error is None for outcome in outcomes) else 1


def main(arguments: Sequence[str]) -> int:
    """The command; exit code 2 for a mistake in the arguments."""
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(bench(load(arguments, "bench")))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
