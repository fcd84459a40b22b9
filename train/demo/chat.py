"""Asks two models the same questions through the openai client and shows their answers side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from openai import OpenAI, OpenAIError
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from train.demo.processes import Failed

MAX_TOKENS = 80
"""Longest answer; those of the demo's rows have up to 60 tokens."""
FRAMES_PER_SECOND = 8


@dataclass(frozen=True)
class Question:
    """A question that is in no training row, and words that a right answer has."""

    text: str
    keywords: tuple[str, ...]

    def is_answered_by(self, answer: str) -> bool:
        """Whether every keyword is in the answer, in capitals or not."""
        return all(keyword.lower() in answer.lower() for keyword in self.keywords)


@dataclass
class Answer:
    """What a model has said so far."""

    text: str = ""
    tokens: int = 0


@dataclass(frozen=True)
class Round:
    """One question and the two models' answers to it."""

    question: Question
    base: Answer = field(default_factory=Answer)
    tuned: Answer = field(default_factory=Answer)


def read_questions(path: Path) -> list[Question]:
    """The first user turn of every row of a JSONL file, with the row's `keywords`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Question(row["messages"][0]["content"], tuple(row["keywords"])) for row in rows]


def ask_both(url: str, questions: Sequence[Question], console: Console) -> list[Round]:
    """Puts every question to the server's two models (the base comes first in its list), both at once.

    The answers are greedy and streamed; on a terminal they grow side by side, elsewhere they are printed when
    both are complete.

    Raises:
        Failed: the server refused or broke off.
    """
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    try:
        base, tuned = (model.id for model in client.models.list().data)
        rounds: list[Round] = []
        with ThreadPoolExecutor(2) as pool:
            for number, question in enumerate(questions, 1):
                rounds.append(Round(question))
                console.print(Text(f"\n{number}. {question.text}", style="bold"))
                streams = [
                    pool.submit(_stream, client, model, question.text, answer)
                    for model, answer in ((base, rounds[-1].base), (tuned, rounds[-1].tuned))
                ]
                _show(rounds[-1], (base, tuned), streams, console)
        return rounds
    except OpenAIError as error:
        raise Failed(f"the server did not answer: {error}") from error


def _stream(client: OpenAI, model: str, question: str, answer: Answer) -> None:
    """Fills `answer` as the tokens come."""
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chunks:
        if chunk.choices:
            answer.text += chunk.choices[0].delta.content or ""
        if chunk.usage is not None:
            answer.tokens = chunk.usage.completion_tokens


def _show(asked: Round, names: tuple[str, str], streams: Sequence[Future[None]], console: Console) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while not all(stream.done() for stream in streams):
            live.update(_columns(asked, names, done=False), refresh=console.is_terminal)
            time.sleep(1 / FRAMES_PER_SECOND)
        live.update(_columns(asked, names, done=True))
    for stream in streams:
        stream.result()


def _columns(asked: Round, names: tuple[str, str], *, done: bool) -> Table:
    table = Table(box=box.ROUNDED, expand=True)
    for heading, answer in zip(_headings(names), (asked.base, asked.tuned), strict=True):
        known = done and asked.question.is_answered_by(answer.text)
        table.add_column(Text(heading), ratio=1, style="green" if known else "")
    table.add_row(*(Text(" ".join(answer.text.split())) for answer in (asked.base, asked.tuned)))
    return table


def _headings(names: tuple[str, str]) -> tuple[str, str]:
    base, tuned = names
    return f"base model ({base})", f"with your adapter ({tuned})"
