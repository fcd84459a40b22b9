"""When the requests of a load test arrive and how long they are: at fixed gaps, all at once, or as in a trace."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from conf.schema import BenchConfig, ConfigError


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request to come."""

    time: float
    """Seconds after the first one."""
    input_tokens: int
    output_tokens: int


def plan(config: BenchConfig) -> list[Arrival]:
    """The requests that `config` describes, in order of their times.

    Raises:
        ConfigError: the trace can't be read, or holds no request.
    """
    if config.trace is not None:
        return _from_trace(config)
    gap = 0.0 if config.rate is None else 1 / config.rate
    return [
        Arrival(time=index * gap, input_tokens=config.input_tokens, output_tokens=config.output_tokens)
        for index in range(config.requests)
    ]


def _from_trace(config: BenchConfig) -> list[Arrival]:
    """The first requests of the trace, from time 0, with scaled times and lengths (at least one token each)."""
    path = Path(str(config.trace))
    readers = {".csv": _azure, ".jsonl": _mooncake}
    if path.suffix not in readers:
        raise ConfigError(f"trace={path} must be a .csv or a .jsonl file")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(islice(readers[path.suffix](file, path), config.requests))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace={path} can't be read: {error}") from error
    if not rows:
        raise ConfigError(f"trace={path} holds no request")
    rows.sort(key=lambda row: row.time)
    return [
        Arrival(
            time=(row.time - rows[0].time) * config.time_scale,
            input_tokens=max(1, round(row.input_tokens * config.length_scale)),
            output_tokens=max(1, round(row.output_tokens * config.length_scale)),
        )
        for row in rows
    ]


def _azure(file: Any, path: Path) -> Iterator[Arrival]:
    """Azure's traces (Patel et al., Splitwise, ISCA 2024): TIMESTAMP, ContextTokens, GeneratedTokens."""
    for number, row in enumerate(csv.DictReader(file), 2):
        try:
            seconds = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
            yield _arrival(seconds, row["ContextTokens"], row["GeneratedTokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise _bad_row(path, number, "TIMESTAMP, ContextTokens, GeneratedTokens", error) from error


def _mooncake(file: Any, path: Path) -> Iterator[Arrival]:
    """Mooncake's traces (Qin et al., FAST 2025): timestamp in ms, input_length, output_length.

    Their prefix hashes are not used: no two prompts share a beginning.
    """
    for number, line in enumerate(file, 1):
        try:
            row: Mapping[str, Any] = json.loads(line)
            yield _arrival(row["timestamp"] / 1000, row["input_length"], row["output_length"])
        except (KeyError, TypeError, ValueError) as error:
            raise _bad_row(path, number, "timestamp, input_length, output_length", error) from error


def _arrival(seconds: float, input_tokens: str | int, output_tokens: str | int) -> Arrival:
    arrival = Arrival(time=seconds, input_tokens=int(input_tokens), output_tokens=int(output_tokens))
    if arrival.input_tokens < 0 or arrival.output_tokens < 0:
        raise ValueError("negative length")
    return arrival


def _bad_row(path: Path, number: int, columns: str, error: Exception) -> ConfigError:
    problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return ConfigError(f"{path}:{number}: not a request with {columns}: {problem}")
