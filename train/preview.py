"""Shows the first rows of a data file as the tokens the model gets, the trained ones marked.

    python -m train.preview data.path=chats.jsonl model=smollm2

The whole file is checked by the code that training uses. On a terminal trained tokens are green and bold,
elsewhere they stand between [[ and ]]; a middle dot parts tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

from conf.check import check
from conf.load import load
from conf.schema import ConfigError
from parallel.model.source import open_source
from train.data import Dataset, Row

TRAINED, OTHER, RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
SEPARATOR = "\u00b7"
LINE_END = "\u21b5\n"


class TokenBytes(Protocol):
    """What showing tokens needs of `parallel.model.tokenizer.Tokenizer`."""

    def token_bytes(self, id: int) -> bytes:
        """The exact bytes of one token."""
        ...


def show_row(row: Row, tokenizer: TokenBytes, *, colour: bool) -> str:
    """A heading with counts, then the row's tokens with the runs of trained ones marked."""
    flags = row.targets.copy()
    flags[:1] = False
    tokens = zip((show_token(tokenizer.token_bytes(int(token))) for token in row.ids), flags, strict=True)
    runs: list[str] = []
    for trained, run in groupby(tokens, key=lambda token: bool(token[1])):
        text = SEPARATOR.join(token for token, _ in run)
        if colour:
            runs.append(f"{TRAINED if trained else OTHER}{text}{RESET}")
        else:
            runs.append(f"[[{text}]]" if trained else text)
    heading = f"row {row.index + 1} (line {row.line}): {len(row.ids)} tokens, {row.num_targets} trained"
    return f"{heading}\n" + SEPARATOR.join(runs).replace(f"\n{SEPARATOR}", "\n").rstrip("\n") + "\n"


def show_token(token: bytes) -> str:
    r"""A token's text: line ends as a mark and a new line, anything unprintable as an escape such as \xe2."""
    text = token.decode("utf-8", "backslashreplace")
    shown = (c if c.isprintable() else LINE_END if c == "\n" else ascii(c)[1:-1] for c in text)
    return "".join(shown)


def main(arguments: Sequence[str]) -> int:
    """Prints preview.rows rows and what became of all of them; returns the exit code (2 for bad input)."""
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        config = load(arguments, "preview")
        source = open_source(config.model)
        config = check(config, "preview", 1, source.architecture)
        tokenizer = source.tokenizer()
        dataset, report = Dataset.load(config.data.path, tokenizer, config.data)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for number in range(min(config.rows, len(dataset))):
        print(show_row(dataset[number], tokenizer, colour=sys.stdout.isatty()))
    print(report.text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
