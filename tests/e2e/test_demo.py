"""The demo from end to end on the tiny model, which learns one answer by heart, and how it fails."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from conf import load
from tests import pasted
from tests.processes import ROOT
from tests.processes import run as run_command
from train.demo import __main__ as demo
from train.demo import processes
from train.demo.chat import Answer, Question, Round, read_questions, side_by_side
from train.demo.processes import Failed
from train.rows import locate, read_entries

QUESTION = Question("What is onemesh?", ("mesh",))
ROW = {
    "messages": [{"role": "user", "content": QUESTION.text}, {"role": "assistant", "content": "mesh"}],
    "keywords": QUESTION.keywords,
}
TINY = (
    "model=tiny", "tune.rank=32", "tune.alpha=64", "optim.lr=5e-3", "train.steps=40", "train.batch_size=1",
    "train.evaluate_every=0", "data.path=one.jsonl", "data.evaluate_path=one.jsonl",
)  # fmt: skip


def test_the_demo_and_what_it_suggests(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps(ROW) + "\n")
    code, printed = run_command(tmp_path, "train.demo", *TINY)
    assert code == 0, printed
    lines = printed.splitlines()
    for text in ("--nproc-per-node=2 -m train ", "step 40/40  loss", "--nproc-per-node=2 -m serve ", "ready after"):
        assert any(text in line for line in lines), (text, printed)
    answers = next(line for line in lines if line.rstrip("│ ").endswith(" mesh"))
    assert "mesh" not in answers.split("│")[1]
    assert "Answers with the expected words: base model 0 of 1, with the adapter 1 of 1." in lines
    run_dir = tmp_path / "runs" / "demo"
    written = {"config.yaml", "metrics.jsonl", "eval.jsonl", "loss.png", "train.log", "serve.log", "checkpoints"}
    assert {path.name for path in run_dir.iterdir()} == written
    assert (run_dir / "checkpoints" / "latest").resolve().name == "step-40"
    assert (run_dir / "serve.log").read_text().splitlines()[-1].startswith("serving tiny, onemesh at ")

    generate, serve, curl, longer, preview = pasted.commands(printed.partition("What to try next\n")[2])
    assert "mesh" in pasted.run(generate, tmp_path, {})
    assert "going on after step 40" in pasted.run(longer, tmp_path, {})
    load.load(pasted.module(serve)[1], "serve")
    load.load(pasted.module(preview)[1], "preview")
    assert curl[:2] == ["curl", f"http://127.0.0.1:{pasted.DEFAULT_PORT}/v1/chat/completions"]
    assert json.loads(curl[-1])["model"] == "onemesh"


def test_a_failed_training_is_told_with_the_words_of_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert demo.main(["model=tiny", "parallel.data=1", "parallel.tensor=3"]) == 1
    first, second = capfd.readouterr().err.splitlines()
    assert first == "demo: training ended with exit code 1; its log is runs/demo/train.log and ends with"
    assert second.startswith("  | parallel.data=1 * pipeline=1 * context=1 * tensor=3 = 3 ranks but the launch has 2")


def test_bad_arguments_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["train.stepz=3"]) == 2
    assert capsys.readouterr().err.startswith("train.stepz=3: train.stepz is not a key of train; did you mean")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "print('no weights'); exit(3)",
            "the server ended with exit code 3; its log is {log} and ends with\n  | no weights",
        ),
        ("import os; os.abort()", "the server was ended by SIGABRT; its log is {log}, which is empty"),
    ],
)
def test_a_server_that_does_not_start(tmp_path: Path, script: str, message: str) -> None:
    log = tmp_path / "serve.log"
    with pytest.raises(Failed) as caught, processes.serving([sys.executable, "-c", script], log, 1, "http://[::1]:1"):
        raise AssertionError("it is not healthy")
    assert str(caught.value) == message.format(log=log)


HEALTHY = """
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[1])))
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
server.serve_forever()
"""


def test_a_server_has_to_stop_with_0_and_is_ended_when_the_block_fails(tmp_path: Path) -> None:
    url, port = demo.free_url()
    log = tmp_path / "serve.log"
    command = [sys.executable, "-c", HEALTHY]
    with processes.serving([*command, "0", str(port)], log, 1, url):
        pass
    refused = pytest.raises(Failed, match="was asked to stop and ended with exit code 4")
    with refused, processes.serving([*command, "4", str(port)], log, 1, url):
        pass
    with pytest.raises(ZeroDivisionError), processes.serving([*command, "0", str(port)], log, 1, url):
        raise ZeroDivisionError
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert f"\0{port}\0" not in path.read_text(errors="replace")


def test_the_last_words_are_those_of_the_ranks() -> None:
    noise = "E1122 03:09 11796 torch/distributed/elastic/multiprocessing/api.py:1002] failed\nTraceback ...\n"
    assert processes.last_words(f"a\nthe error\n{noise}") == ["a", "the error"]
    assert processes.last_words(noise)[-1] == "Traceback ..."
    assert processes.last_words("\n".join(map(str, range(99)))) == [str(number) for number in range(84, 99)]
    assert processes.last_words("") == []


@pytest.mark.parametrize(
    ("answers", "passed"),
    [("yyyy", True), ("ynyn", True), ("ynnn", False), ("nyyy", False)],
)
def test_the_adapter_has_to_know(answers: str, passed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The first question, and half of all."""
    rounds = [Round(QUESTION, Answer("?"), Answer("a MESH" if answer == "y" else "a net")) for answer in answers]
    assert demo.judge(rounds, Console()) == passed
    assert ("did not learn what it was taught" in capsys.readouterr().err) != passed


@pytest.mark.parametrize("width", [40, 80, 157])
def test_answers_stand_side_by_side_at_any_width(width: int) -> None:
    out = io.StringIO()
    asked = Round(QUESTION, Answer("left " * 30), Answer("right " * 30))
    Console(file=out, width=width).print(side_by_side(asked, done=True))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) == width
    assert sum("left" in line and "right" in line for line in lines) >= 2
    assert out.getvalue().count("left") == out.getvalue().count("right") == 30


def test_answers_cannot_steer_the_terminal() -> None:
    out = io.StringIO()
    asked = Round(QUESTION, Answer("a\x1b[2Jb\nc\x07"), Answer("\r\x9bd"))
    Console(file=out, width=60).print(side_by_side(asked, done=True))
    assert out.getvalue().replace("\n", "").isprintable()
    assert "a\ufffd[2Jb c\ufffd" in out.getvalue()


def test_no_question_is_a_training_row_and_each_has_an_answer_with_its_keywords() -> None:
    path = locate("package:train/demo/questions.jsonl")
    questions = read_questions(path)
    asked = {
        message["content"]
        for entry in read_entries("package:train/demo/chats.jsonl")
        for message in getattr(entry.content, "messages", ())
    }
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(questions) == len(rows) == 8
    assert "onemesh" in questions[0].text
    for question, row in zip(questions, rows, strict=True):
        assert question.text not in asked
        assert question.keywords
        assert question.is_answered_by(row["messages"][1]["content"])


def test_a_question_without_keywords_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(ROW) + '\n{"messages": []}\n')
    with pytest.raises(demo.ConfigError, match=r"questions\.jsonl line 2 is not"):
        read_questions(path)
