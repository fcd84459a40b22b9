"""Bad input through the commands themselves: exit code 2 and one message with field, value, rule and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernels import cpu_ops
from parallel import comm
from tests.commands import train as train_on
from tests.processes import run
from tests.refusals import COMMANDS, Refused

CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
TRAIN = ("model=tiny", "data.path=chats.jsonl", "run_dir=run", "train.steps=1")

OPTIONS = {
    "unknown key": (
        1, ["optim.lrr=1"], "optim.lrr=1: optim.lrr is not a key of train; did you mean optim.lr?",
    ),
    "key of another command": (
        1, ["port=1"], "port=1 has no effect in train: port is a key of serve",
    ),
    "unknown schedule": (
        1, ["parallel.schedule=1f1c"],
        "parallel.schedule=1f1c is not one of gpipe, 1f1b, interleaved, zero_bubble, zbv; did you mean 1f1b?",
    ),
    "planned schedule": (
        1, ["parallel.schedule=pipedream"],
        "parallel.schedule=pipedream is not available yet; use one of gpipe, 1f1b, interleaved, zero_bubble, zbv",
    ),
    "degrees of another number of ranks": (
        3, ["parallel.tensor=2", "parallel.data=2"],
        "parallel.data=2 * pipeline=1 * context=1 * tensor=2 = 4 ranks but the launch has 3; start 4 ranks "
        "(torchrun --nproc-per-node=4) or change a degree",
    ),
    "ranks left over": (
        3, ["parallel.tensor=2"],
        "parallel.pipeline=1 * context=1 * tensor=2 = 2 ranks but the launch has 3, not a multiple of 2; start a "
        "multiple or change a degree",
    ),
    "more tensor ranks than heads": (
        10, ["parallel.tensor=10"], "parallel.tensor=10 exceeds the model's num_heads=9; use parallel.tensor<=9",
    ),
    "more tensor ranks than heads of the real model": (
        10, ["model=smollm2", "parallel.tensor=10"],
        "parallel.tensor=10 exceeds the model's num_heads=9; use parallel.tensor<=9",
    ),
    "more stages than layers": (
        6, ["parallel.pipeline=6"], "parallel.pipeline=6 exceeds the model's num_layers=5; use parallel.pipeline<=5",
    ),
    "no data": (
        1, ["data.path=none.jsonl"], "data.path=none.jsonl is not a file; give a JSONL file or a JSON array",
    ),
    "no model": (
        1, ["model=hf", "model.path=no/such/model"],
        "model.path=no/such/model does not exist; give a model directory, a .gguf file or a hub id (owner/name)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "ranks"),
    [
        (("train", *TRAIN), 2),
        (("serve", "model=tiny", "port=0"), None),
        (("serve.generate", "model=tiny", "prompt=x"), None),
    ],
    ids=["train", "serve", "generate"],
)
def test_an_instruction_set_that_is_not_there(
    command: tuple[str, ...], ranks: int | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes of their own: a process chooses once."""
    if not cpu_ops.LIBRARY.is_file():
        pytest.skip("the C++ kernels aren't built, so ONEMESH_CPU_ISA has no effect")
    monkeypatch.setenv("ONEMESH_CPU_ISA", "avx9")
    code, printed = run(folder, *command, ranks=ranks)
    lines = [line for line in printed.splitlines() if "ONEMESH_CPU_ISA" in line]
    assert len(lines) == 1, printed
    assert lines[0].startswith("ONEMESH_CPU_ISA=avx9 is not one of ")
    assert lines[0].endswith("generic; use one of them, or unset it for the best one")
    if ranks is None:  # torchrun ends with 1 whatever its ranks' code, and reports it
        assert (code, printed.splitlines()) == (2, lines)
    else:
        assert "exitcode  : 2 " in printed, printed


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options(refused: Refused, case: str) -> None:
    ranks, arguments, message = OPTIONS[case]
    assert refused("train", *TRAIN, *arguments, ranks=ranks) == message
    assert not Path("run").exists()


def test_serving_needs_the_ranks_of_its_layout(refused: Refused) -> None:
    assert refused("serve", "model=tiny", "parallel.tensor=2", "parallel.pipeline=2") == (
        "parallel.data=1 * pipeline=2 * context=1 * tensor=2 = 4 ranks but the launch has 1; start 4 ranks "
        "(torchrun --nproc-per-node=4) or change a degree"
    )
    assert refused("generate", "model=tiny", "prompt=x", "promt=y") == (
        "promt=y: promt is not a key of generate; did you mean prompt?"
    )


def test_everything_that_is_wrong_is_told_at_once(refused: Refused) -> None:
    """Ranges, options without effect, missing files, and what doesn't fit the model and the launch."""
    bad = {
        "optim.lr=-1": "optim.lr=-1.0 is out of range; use optim.lr>=0",
        "train.steps=0": "train.steps=0 is out of range; use train.steps>=1",
        "optim.min_lr=1": "optim.min_lr=1.0 has no effect with optim.schedule=constant",
        "parallel.tensor=10": "parallel.tensor=10 exceeds the model's num_heads=9; use parallel.tensor<=9",
        "parallel.pipeline=6": "parallel.pipeline=6 exceeds the model's num_layers=5; use parallel.pipeline<=5",
        "data.path=none.jsonl": "data.path=none.jsonl is not a file",
        "data.max_length=9999": "data.max_length=9999 exceeds the model's max_positions=2048",
        "tune.targets=[q_pro]": "tune.targets: q_pro is not one of",
    }
    lines = refused("train", *TRAIN, "tune=lora", *bad, ranks=50).split("\n")
    expected = [*bad.values(), "* tensor=10 = 60 ranks but the launch has 50", "optim.min_lr=1.0 exceeds optim.lr=-1.0"]
    assert len(lines) == len(expected)
    for text in expected:
        assert any(text in line for line in lines), (text, lines)

    unreadable = {
        "optim.lrr=1": "optim.lrr is not a key of train; did you mean optim.lr?",
        "parallel.schedule=x": "parallel.schedule=x is not one of gpipe, 1f1b",
        "train.steps=ten": "train.steps=ten is not an integer",
    }
    lines = refused("train", *TRAIN, *unreadable).split("\n")
    assert [text in line for text, line in zip(unreadable.values(), lines, strict=True)] == [True] * 3


def test_one_rank_of_a_host_tells_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(comm, "TELL_S", 0.0)
    for rank, local_rank in ((1, 1), (2, 0)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        for command, main in COMMANDS.items():
            assert main(["optim.lrr=1", "model=tiny"]) == 2, command
            printed = capsys.readouterr()
            assert printed.out == ""
            assert printed.err.startswith("[rank 2 on ") if rank == 2 else printed.err == ""


LINE = json.dumps(CHAT)
ROWS = {
    "not JSON": (
        f'{LINE}\n\n{LINE}\n{{"messages": [}}\n', [],
        "data.path=rows.jsonl line 4 is not JSON (Expecting value); a file is one object a line or one array",
    ),
    "cut off": (
        f"{LINE}\n{LINE[:40]}", [],
        "data.path=rows.jsonl line 2 is not JSON (Expecting ':' delimiter); a file is one object a line or one "
        "array",
    ),
    "unknown role": (
        f"{LINE}\n{LINE.replace('user', 'robot')}\n", [],
        "data.path=rows.jsonl line 2: message 1 has unknown role 'robot'; use one of system, user, assistant, tool",
    ),
    "unknown shape": (
        '{"question": "a", "answer": "b"}\n', [],
        "data.path=rows.jsonl line 1: unknown row shape (keys: answer, question); a row has \"messages\", "
        '"conversations", "text", or "instruction" with "output"',
    ),
    "too long": (
        f"{LINE}\n{LINE.replace('hello', 'hello' * 30)}\n", ["data.too_long=error", "data.max_length=100"],
        "data.path=rows.jsonl line 2 has 173 tokens, over data.max_length=100; raise data.max_length or set "
        "data.too_long=truncate|drop",
    ),
    "nothing to train": (
        f"{LINE.replace('assistant', 'user')}\n", [],
        "data.path=rows.jsonl has no row to train on: data.path=rows.jsonl: 0 of 1 row, 0 tokens, 0 of them trained; "
        "1 row with nothing to train dropped: line 1. assistant turns train with data.loss_on=assistant|last, every "
        "token with data.loss_on=all",
    ),
    "empty": (
        "", [],
        'data.path=rows.jsonl is empty; a row has "messages", "conversations", "text", or "instruction" with "output"',
    ),
    "not text": (
        b"\xff\xfe\x00\x01\n", [],
        "data.path=rows.jsonl line 1 is not UTF-8 text (byte 0); convert the file to UTF-8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows(refused: Refused, case: str) -> None:
    text, arguments, message = ROWS[case]
    Path("rows.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refused("train", *TRAIN, "data.path=rows.jsonl", *arguments) == message
    assert not Path("run").exists()


def test_long_rows_are_cut_and_reported_by_default(folder: Path) -> None:
    Path("rows.jsonl").write_text(f"{LINE}\n{LINE.replace('hi', 'hi' * 60)}\n{LINE.replace('assistant', 'user')}\n")
    rows = f"data.path={folder / 'rows.jsonl'}"
    code, printed = train_on(
        1, ["model=tiny", rows, f"run_dir={folder / 'run'}", "train.steps=1", "data.max_length=80"]
    )
    assert code == 0
    assert "2 of 3 rows" in printed
    assert "1 row cut to data.max_length=80" in printed
    assert "1 row with nothing to train dropped: line 3" in printed


def test_bad_prompt_files(refused: Refused) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    assert refused("generate", "model=tiny", "prompts=prompts.jsonl") == (
        'prompts=prompts.jsonl:2 is no {"prompt": text} or {"messages": [...]} '
        "(Expecting ':' delimiter: line 1 column 10 (char 9))"
    )
    Path("prompts.jsonl").write_text(LINE.replace("user", "robot"))
    assert "prompts=prompts.jsonl:1 " in (message := refused("generate", "model=tiny", "prompts=prompts.jsonl"))
    assert "messages[0].role='robot' is unknown; use one of" in message


def test_a_run_does_not_go_on_with_another_base_or_other_options(refused: Refused, trained: Path) -> None:
    goes_on = (*TRAIN[:1], f"data.path={trained / 'chats.jsonl'}", f"run_dir={trained / 'run-lora'}", "tune=lora")
    message = refused("train", *goes_on, "train.steps=2", "optim.lr=1", "model.seed=1")
    assert message.splitlines()[1:-1] == ["  model.seed: was 0, now 1", "  optim.lr: was 0.0001, now 1.0"]
    assert "may change; set the others back, use another run_dir, or train.resume=never" in message
    message = refused("train", *TRAIN, "train.resume=chats")
    assert message == "train.resume=chats is not auto, never or a checkpoint's directory"


def test_the_process_itself_exits_with_2(folder: Path) -> None:
    message = "optim.lrr=1: optim.lrr is not a key of train; did you mean optim.lr?\n"
    assert run(folder, "train", *TRAIN, "optim.lrr=1") == (2, message)


def test_under_torchrun_one_rank_tells_it_once(folder: Path) -> None:
    code, printed = run(folder, "train", *TRAIN, "parallel.tensor=3", ranks=2)
    assert code != 0
    rule = "parallel.pipeline=1 * context=1 * tensor=3 = 3 ranks but the launch has 2, not a multiple of 3"
    assert printed.count(rule) == 1
    assert "exitcode  : 2" in printed
