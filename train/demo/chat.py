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

from conf.schema import ConfigError
from train.demo.processes import Failed

MAX_TOKENS = 64
"""Longest answer; those of the demo's questions have up to 56 tokens."""
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
    """The first message of every row of a JSONL file, with the row's `keywords`.

    Raises:
        ConfigError: a row is not of that form; names file and line.
    """
    questions: list[Question] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            questions.append(Question(row["messages"][0]["content"], tuple(row["keywords"])))
        except (ValueError, LookupError, TypeError) as error:
            form = '{"messages": [...], "keywords": [...]}'
            raise ConfigError(f"{path} line {number} is not {form} ({error!r})") from None
    return questions


def ask_both(url: str, questions: Sequence[Question], console: Console) -> list[Round]:
    """Puts every question to the server's two models (the base comes first in its list), all at the same time.

    The answers are greedy and streamed. They are shown question by question: on a terminal they grow side by
    side, elsewhere both are printed when they are complete.

    Raises:
        Failed: the server refused or broke off.
    """
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    rounds = [Round(question) for question in questions]
    try:
        base, tuned = (model.id for model in client.models.list().data)
        console.print(f"base model: {base}; adapter: {tuned}", markup=False)
        with ThreadPoolExecutor(2 * len(rounds)) as pool:
            streams = [
                (pool.submit(_stream, client, base, one.question.text, one.base),
                 pool.submit(_stream, client, tuned, one.question.text, one.tuned))
                for one in rounds
            ]  # fmt: skip
            for number, (one, pair) in enumerate(zip(rounds, streams, strict=True), 1):
                console.print(Text(f"\n{number}. {one.question.text}", style="bold"))
                _show(one, pair, console)
    except OpenAIError as error:
        raise Failed(f"the server did not answer: {error}") from error
    return rounds


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
            answer.text += " ..." if chunk.choices[0].finish_reason == "length" else ""
        if chunk.usage is not None:
            answer.tokens = chunk.usage.completion_tokens


def _show(asked: Round, streams: Sequence[Future[None]], console: Console) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while not all(stream.done() for stream in streams):
            live.update(side_by_side(asked, done=False), refresh=console.is_terminal)
            time.sleep(1 / FRAMES_PER_SECOND)
        live.update(side_by_side(asked, done=True))
    for stream in streams:
        stream.result()


def side_by_side(asked: Round, *, done: bool) -> Table:
    """The two answers as columns of equal width; once they are `done`, right ones are green on a terminal."""
    table = Table(box=box.ROUNDED, expand=True)
    for heading, answer in (("base model", asked.base), ("with the adapter", asked.tuned)):
        right = done and asked.question.is_answered_by(answer.text)
        table.add_column(heading, ratio=1, overflow="fold", style="green" if right else "")
    table.add_row(Text(_one_line(asked.base.text)), Text(_one_line(asked.tuned.text)))
    return table


def _one_line(text: str) -> str:
    """Text without line ends, and without characters that a terminal would obey."""
    return "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text.split()))
