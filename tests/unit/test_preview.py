"""What `train.preview` prints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from train.data import Row
from train.preview import main, show_row, show_token


class Words:
    """Tokens are words of a list."""

    words = (b"<s>", b"user\n", b"Hi", b"\n", b"You", b" too", b"\xc3", b"\xa9", b"</s>")

    def token_bytes(self, id: int) -> bytes:
        return self.words[id]


ROW = Row(np.arange(9, dtype=np.int32), np.array([False] * 4 + [True, True, False, False, True]), index=4, line=7)


def test_trained_runs_stand_in_brackets() -> None:
    assert show_row(ROW, Words(), colour=False) == (
        "row 5 (line 7): 9 tokens, 3 trained\n"
        "<s>\u00b7user\u21b5\n"
        "Hi\u00b7\u21b5\n"
        "[[You\u00b7 too]]\u00b7\\xc3\u00b7\\xa9\u00b7[[</s>]]\n"
    )


def test_trained_runs_are_green_on_a_terminal() -> None:
    shown = show_row(ROW, Words(), colour=True)
    assert "\x1b[1;32mYou\u00b7 too\x1b[0m" in shown
    assert "[[" not in shown
    assert shown.count("\x1b[1;32m") == 2


def test_a_first_token_is_never_trained() -> None:
    row = Row(np.array([2, 4], np.int32), np.array([True, True]), index=0, line=1)
    shown = show_row(row, Words(), colour=False)
    assert shown == "row 1 (line 1): 2 tokens, 1 trained\nHi\u00b7[[You]]\n"


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (b"a\tb", "a\\tb"),
        (b"\x1b[2J", "\\x1b[2J"),
        ("\u20ac".encode(), "\u20ac"),
        (b"\n\n", "\u21b5\n\u21b5\n"),
    ],
)
def test_tokens_cannot_steer_the_terminal(token: bytes, shown: str) -> None:
    assert show_token(token) == shown


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo!"}]
    rows = [{"messages": turns}, {"messages": turns[:1]}, {"text": "x=\u20ac"}, {"text": "unseen"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([f"data.path={path}", "model=tiny", "rows=2"]) == 0
    shown = capsys.readouterr().out
    assert "[[Y\u00b7o\u00b7!\u00b7<|im_end|>]]" in shown
    assert "row 3 (line 3): 6 tokens, 5 trained\nx\u00b7[[=\u00b7\\xe2\u00b7\\x82\u00b7\\xac\u00b7<|" in shown
    assert "unseen" not in shown.replace("\u00b7", "")
    assert shown.endswith("1 row with nothing to train dropped: line 2.\n")


def test_bad_input_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    assert main([f"data.path={path}", "model=tiny"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"data.path={path} line 1: unknown row shape (keys: none)")
    assert main(["data.pth=x", "model=tiny"]) == 2
    assert "data.path" in capsys.readouterr().err
