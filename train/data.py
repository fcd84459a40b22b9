r"""Rows as tokens with a mask of the trained ones: tokenised once, kept compact, dropped rows reported.

The loss mask is built from segments, never by searching in rendered text: the tokenizer says which tokens an
assistant turn adds (its content and the end token), and `data.loss_on` chooses among them:

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user ...
                                                           ^^^^^^^^^^^^^^^^ trained by loss_on=assistant

train/rows.py reads and checks the rows, train/batches.py orders and packs them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from conf.schema import ConfigError, DataConf
from train.rows import Chat, Entry, Text, read_entries

SHOWN_ROWS = 10

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


class Segment(Protocol):
    """A run of tokens of a rendered chat; `target` runs are what an assistant turn itself adds."""

    @property
    def ids(self) -> Sequence[int]:
        """Its token ids."""
        ...

    @property
    def target(self) -> bool:
        """Whether the model should learn to write it."""
        ...


class RowTokenizer(Protocol):
    """What this file needs of `parallel.model.tokenizer.Tokenizer`, where it is described."""

    @property
    def eos_id(self) -> int | None:
        """The end-of-text token."""
        ...

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids; with `bos` also what the model puts around a text."""
        ...

    def segments(self, messages: Any, *, tools: Any = None) -> Sequence[Segment]:
        """The rendered chat in runs of context and targets; raises ValueError for a chat it refuses."""
        ...


@dataclass(frozen=True, eq=False)
class Row:
    """One tokenised row.

    ids: int32 [tokens]. targets: bool [tokens], whether a token is trained; a first token never counts, as
    nothing predicts it. index: row number in the file, from 0. line: its line in the file, from 1.
    """

    ids: Ids
    targets: Mask
    index: int
    line: int

    @property
    def num_targets(self) -> int:
        """Trained tokens: those with a predecessor in the row."""
        return int(self.targets[1:].sum())


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the rows of one file, to be told on rank 0."""

    key: str
    path: str
    rows: int
    kept: int
    tokens: int
    target_tokens: int
    max_length: int
    truncated: int = 0
    too_long: tuple[str, ...] = ()
    """Places of the rows dropped by data.too_long=drop."""
    untrained: tuple[str, ...] = ()
    """Places of the rows dropped because nothing in them is trained, also when the cut took it."""
    held_out: int = 0
    ignored_tools: int = 0
    """Rows whose tools the chat template doesn't show to the model."""

    @property
    def text(self) -> str:
        """One paragraph: rows, tokens, and every row that was cut, dropped or held out."""
        counts = f"{self.tokens:,} tokens, {self.target_tokens:,} of them trained"
        parts = [f"{self.key}={self.path}: {self.kept} of {_rows(self.rows)}, {counts}"]
        limit = f"data.max_length={self.max_length}"
        if self.held_out:
            parts.append(f"{_rows(self.held_out)} held out for evaluation")
        if self.truncated:
            parts.append(f"{_rows(self.truncated)} cut to {limit}")
        if self.too_long:
            parts.append(f"{_rows(len(self.too_long))} over {limit} dropped: {_places(self.too_long)}")
        if self.untrained:
            count = _rows(len(self.untrained))
            parts.append(f"{count} with nothing to train dropped: {_places(self.untrained)}")
        if self.ignored_tools:
            count = _rows(self.ignored_tools)
            parts.append(f"{count} with tools that this chat template does not show to the model")
        return "; ".join(parts) + "."


@dataclass(frozen=True, eq=False)
class Dataset:
    """Tokenised rows in four flat arrays; a row is a view.

    ids: int32 [all tokens]. targets: bool [all tokens]. offsets: int64 [rows + 1], row i is offsets[i:i+2].
    indices, lines: int64 [rows], the row's number (from 0) and line (from 1) in its file.
    """

    ids: Ids
    targets: Mask
    offsets: NDArray[np.int64]
    indices: NDArray[np.int64]
    lines: NDArray[np.int64]

    @staticmethod
    def load(path: str, tokenizer: RowTokenizer, data: DataConf, key: str = "data.path") -> tuple[Dataset, Report]:
        """Reads, checks and tokenises a data file. `key` is the configuration key that messages name.

        Raises ConfigError naming file and line for a row that breaks a rule (see train/rows.py), for a row
        over data.max_length when data.too_long=error, and for a file in which nothing is trained.
        """
        builder = _Builder(path, tokenizer, data, key)
        for entry in read_entries(path, key):
            builder.add(entry)
        dataset = builder.dataset()
        report = builder.report(dataset)
        if not len(dataset):
            rules = "assistant turns train with data.loss_on=assistant|last, every token with data.loss_on=all"
            raise ConfigError(f"{key}={path} has no row to train on: {report.text} {rules}")
        return dataset, report

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Row:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of a dataset of {len(self)} rows")
        start, stop = self.offsets[number], self.offsets[number + 1]
        index, line = int(self.indices[number]), int(self.lines[number])
        return Row(self.ids[start:stop], self.targets[start:stop], index, line)

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    @property
    def num_targets(self) -> int:
        """Trained tokens of all rows: each target but a row's first token."""
        return int(self.targets.sum()) - int(self.targets[self.offsets[:-1]].sum())

    @property
    def fingerprint(self) -> str:
        """SHA-256 over tokens, masks and row borders: two datasets that train alike have the same one."""
        digest = hashlib.sha256()
        for part in (self.ids, self.targets, self.offsets):
            digest.update(part.tobytes())
        return digest.hexdigest()

    def select(self, chosen: Mask) -> Dataset:
        """The dataset of the rows where `chosen` (bool [rows]) holds, in the same order."""
        lengths = np.diff(self.offsets)
        tokens = np.repeat(chosen, lengths)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[chosen])])
        return Dataset(self.ids[tokens], self.targets[tokens], offsets, self.indices[chosen], self.lines[chosen])


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The rows to train on, those to evaluate on (None without evaluation), and what to tell about them."""

    train: Dataset
    evaluate: Dataset | None
    reports: tuple[Report, ...]


def load_training_data(data: DataConf, tokenizer: RowTokenizer) -> TrainingData:
    """Loads data.path and the evaluation rows: data.evaluate_path, or every k-th row of data.path.

    Held out are the rows whose number in the file (from 0) is k - 1 modulo k: with data.evaluate_fraction=0.2
    the rows 4, 9, 14, ... The choice depends on row numbers alone, so no other option changes it.
    Raises ConfigError as `Dataset.load`, and when the fraction leaves one side without rows.
    """
    dataset, report = Dataset.load(data.path, tokenizer, data)
    if data.evaluate_path:
        evaluate, evaluate_report = Dataset.load(data.evaluate_path, tokenizer, data, "data.evaluate_path")
        return TrainingData(train=dataset, evaluate=evaluate, reports=(report, evaluate_report))
    stride = data.evaluate_stride
    if stride is None:
        return TrainingData(train=dataset, evaluate=None, reports=(report,))
    held_out: Mask = dataset.indices % stride == stride - 1
    if held_out.all() or not held_out.any():
        side = "training" if held_out.all() else "evaluation"
        raise ConfigError(
            f"data.evaluate_fraction={data.evaluate_fraction} leaves none of {_rows(len(dataset))} for "
            f"{side}; change the fraction or name a second file in data.evaluate_path"
        )
    train, evaluate = dataset.select(~held_out), dataset.select(held_out)
    report = replace(
        report,
        kept=len(train),
        held_out=len(evaluate),
        tokens=len(train.ids),
        target_tokens=train.num_targets,
    )
    return TrainingData(train=train, evaluate=evaluate, reports=(report,))


def tokenize(content: Chat | Text, tokenizer: RowTokenizer, loss_on: str) -> tuple[list[int], list[bool]]:
    """Ids and trained-flags of one row, before any cut.

    loss_on: "assistant" trains every assistant turn, "last" the last one, "all" every token. A document
    trains all its tokens, starts as the model's texts do and ends with the end-of-text token if there is one.
    """
    if isinstance(content, Text):
        ids = tokenizer.encode(content.text, bos=True)
        if tokenizer.eos_id is not None and ids[-1:] != [tokenizer.eos_id]:
            ids.append(tokenizer.eos_id)
        return ids, [True] * len(ids)
    ids, flags = [], []
    for segment in tokenizer.segments(content.messages, tools=content.tools):
        ids.extend(segment.ids)
        flags.extend([segment.target] * len(segment.ids))
    if loss_on == "all":
        return ids, [True] * len(ids)
    if loss_on == "last":
        stop = max((i + 1 for i, flag in enumerate(flags) if flag), default=0)
        start = max((i + 1 for i in range(stop) if not flags[i]), default=0)
        flags[:start] = [False] * start
    return ids, flags


@dataclass
class _Builder:
    """Collects tokenised rows in flat growing arrays (5 bytes a token) and counts what it cuts and drops."""

    path: str
    tokenizer: RowTokenizer
    data: DataConf
    key: str
    ids: array[int] = field(default_factory=lambda: array("i"))
    flags: bytearray = field(default_factory=bytearray)
    offsets: array[int] = field(default_factory=lambda: array("q", [0]))
    indices: array[int] = field(default_factory=lambda: array("q"))
    lines: array[int] = field(default_factory=lambda: array("q"))
    rows: int = 0
    truncated: int = 0
    too_long: list[str] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)
    rows_with_tools: int = 0
    shows_tools: bool = True

    @property
    def max_length(self) -> int:
        """data.max_length of a checked config."""
        assert self.data.max_length is not None, "data.max_length of an unchecked DataConf"
        return self.data.max_length

    def add(self, entry: Entry) -> None:
        """Tokenises one row, applies data.max_length, and keeps it if anything in it is trained."""
        self.rows += 1
        try:
            ids, flags = tokenize(entry.content, self.tokenizer, self.data.loss_on)
            self._note_tools(entry.content, ids)
        except ValueError as error:
            raise ConfigError(f"{self.key}={self.path} {entry.place}: {error}") from error
        limit, length = self.max_length, len(ids)
        if length > limit and self.data.too_long == "error":
            raise ConfigError(
                f"{self.key}={self.path} {entry.place} has {length} tokens, over data.max_length={limit}; "
                "raise data.max_length or set data.too_long=truncate|drop"
            )
        if length > limit and self.data.too_long == "drop":
            self.too_long.append(entry.place)
            return
        if not any(flags[1:limit]):
            self.untrained.append(entry.place)
            return
        self.truncated += length > limit
        self.ids.extend(ids[:limit])
        self.flags.extend(flags[:limit])
        self.offsets.append(len(self.ids))
        self.indices.append(entry.index)
        self.lines.append(entry.line)

    def _note_tools(self, content: Chat | Text, ids: list[int]) -> None:
        """Finds out at the first row with tools whether the template renders them."""
        if isinstance(content, Text) or content.tools is None:
            return
        if not self.rows_with_tools:
            self.shows_tools = tokenize(replace(content, tools=None), self.tokenizer, "all")[0] != ids
        self.rows_with_tools += 1

    def dataset(self) -> Dataset:
        """The kept rows."""
        return Dataset(
            np.array(self.ids, dtype=np.int32),
            np.frombuffer(bytes(self.flags), dtype=np.bool_),
            np.array(self.offsets, dtype=np.int64),
            np.array(self.indices, dtype=np.int64),
            np.array(self.lines, dtype=np.int64),
        )

    def report(self, dataset: Dataset) -> Report:
        """What became of the file's rows."""
        return Report(
            key=self.key,
            path=self.path,
            rows=self.rows,
            kept=len(dataset),
            tokens=len(dataset.ids),
            target_tokens=dataset.num_targets,
            max_length=self.max_length,
            truncated=self.truncated,
            too_long=tuple(self.too_long),
            untrained=tuple(self.untrained),
            ignored_tools=0 if self.shows_tools else self.rows_with_tools,
        )


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def _places(places: Sequence[str]) -> str:
    more = len(places) - SHOWN_ROWS
    return ", ".join(places[:SHOWN_ROWS]) + (f" and {more} more" if more > 0 else "")
