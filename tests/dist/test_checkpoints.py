"""Checkpoints: any layout resumes any other's, the same layout bitwise; directories are PEFT's and transformers'."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parallel import checkpoint
from parallel.checkpoint import blocks, contents, directory
from parallel.checkpoint.__main__ import main
from parallel.checkpoint.verify import verify
from tests.commands import losses, metrics, train, write_chats
from tests.ranks import needs_shared_memory, on_ranks

TUNES = {
    "full": ["tune=full"],
    "lora": ["tune=lora", "tune.rank=4", "tune.dropout=0.1"],
    "prefix": ["tune=prefix", "tune.virtual_tokens=6"],
    "projected": ["tune=prefix", "tune.virtual_tokens=6", "tune.prefix_projection=true", "tune.prefix_hidden=16"],
}
LAYOUTS = {
    "tensor2_pipeline2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "data2": (2, ["parallel.data=2"]),
    "data3_zero": (3, ["parallel.data=3", "optim=zero1"]),
    "alone": (1, []),
    "tensor3": (3, ["parallel.tensor=3"]),
}
SCHEDULES = {
    "zbv": (2, ["parallel.pipeline=2", "parallel.schedule=zbv"]),
    "interleaved": (2, ["parallel.pipeline=2", "parallel.schedule=interleaved", "parallel.stages=[1,1,1,2]"]),
    "1f1b": (2, ["parallel.pipeline=2"]),
}
FOUR = {"data2_tensor2": (4, ["parallel.data=2", "parallel.tensor=2"])}


def run(folder: Path, layout: str, tune: str, steps: int, *more: str) -> int:
    """Trains the tiny model into `folder`/run."""
    data = folder / "chats.jsonl"
    if not data.exists():
        write_chats(data)
    ranks, keys = (LAYOUTS | SCHEDULES | FOUR)[layout]
    arguments = [
        "model=tiny", f"data.path={data}", f"run_dir={folder / 'run'}", "optim.lr=0.003", "train.batch_size=6",
        "optim.schedule=cosine", "optim.decay_steps=8", f"train.steps={steps}", *TUNES[tune], *keys, *more,
    ]  # fmt: skip
    code, printed = train(ranks, arguments)
    assert code == 0, printed
    return code


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything saved in the latest checkpoint."""
    latest = folder / "run" / "checkpoints" / "latest"
    files = sorted(path for path in latest.rglob("*.safetensors"))
    return {f"{path.name}:{name}": tensor for path in files for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("tune", TUNES)
def test_the_same_layout_resumes_bitwise(tmp_path: Path, tune: str) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
    run(whole, "tensor2_pipeline2", tune, 8)
    run(halves, "tensor2_pipeline2", tune, 4)
    run(halves, "tensor2_pipeline2", tune, 8)
    assert losses(halves / "run") == losses(whole / "run")
    expected = tensors(whole)
    found = tensors(halves)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.equal(found[name]), name


@pytest.mark.parametrize("tune", TUNES)
def test_any_layout_resumes_another_ones_checkpoint(tmp_path: Path, tune: str) -> None:
    start = tmp_path / "start"
    start.mkdir()
    run(start, "tensor2_pipeline2", tune, 4)
    expected = None
    for layout in LAYOUTS:
        folder = tmp_path / layout
        folder.mkdir()
        (folder / "chats.jsonl").write_bytes((start / "chats.jsonl").read_bytes())
        resume = start / "run" / "checkpoints" / "step-4"
        run(folder, layout, tune, 8, f"train.resume={resume}", f"data.path={start / 'chats.jsonl'}")
        found = [line["loss"] for line in metrics(folder / "run")]
        assert len(found) == 4
        expected = expected or found
        assert found == pytest.approx(expected, rel=1e-5), layout


@pytest.mark.parametrize("tune", ["full", "prefix"])
def test_any_schedule_resumes_another_ones_checkpoint_bitwise(tmp_path: Path, tune: str) -> None:
    start = tmp_path / "start"
    start.mkdir()
    run(start, "zbv", tune, 2)
    expected = None
    for schedule in SCHEDULES:
        folder = tmp_path / schedule
        folder.mkdir()
        resume = start / "run" / "checkpoints" / "step-2"
        more = [f"train.resume={resume}", f"data.path={start / 'chats.jsonl'}"]
        run(folder, schedule, tune, 4, *more)
        found = ([line["loss"] for line in metrics(folder / "run")], tensors(folder))
        expected = expected or found
        assert found[0] == expected[0]
        assert found[1].keys() == expected[1].keys()
        for name, tensor in expected[1].items():
            assert tensor.equal(found[1][name]), (schedule, name)


@needs_shared_memory
@pytest.mark.parametrize("tune", ["full", "projected"])
def test_zero_saves_what_adamw_saves_and_each_goes_on_from_the_other(tmp_path: Path, tune: str) -> None:
    folders = {name: tmp_path / name for name in ("adamw", "zero", "mixed")}
    for folder in folders.values():
        folder.mkdir()
    run(folders["adamw"], "data2_tensor2", tune, 6)
    run(folders["zero"], "data2_tensor2", tune, 6, "optim=zero1")
    for steps, optim in ((2, "zero1"), (4, "adamw"), (6, "zero1")):
        run(folders["mixed"], "data2_tensor2", tune, steps, f"optim={optim}")
    expected = tensors(folders["adamw"])
    for name in ("zero", "mixed"):
        assert losses(folders[name] / "run") == losses(folders["adamw"] / "run")
        found = tensors(folders[name])
        assert found.keys() == expected.keys()
        assert all(tensor.equal(found[key]) for key, tensor in expected.items())
        assert verify(folders[name] / "run/checkpoints/latest").problems == ()


def test_saving_without_a_step_between_gives_the_same_bytes_under_every_layout(tmp_path: Path) -> None:
    """A -> B -> A: what a layout reads it writes back bit for bit."""
    first = tmp_path / "first"
    first.mkdir()
    run(first, "tensor2_pipeline2", "full", 1)
    expected = load_file(first / "run/checkpoints/latest/model.safetensors")
    for ranks, sizes in ((3, (1, 1, 3)), (2, (1, 2, 1)), (1, (1, 1, 1)), (4, (1, 1, 4))):
        target = tmp_path / f"again-{ranks}"
        on_ranks(ranks, _read_and_write, first / "run/checkpoints/latest", target, sizes)
        found = load_file(target / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert tensor.equal(found[name]), name


def _read_and_write(launch, source: Path, target: Path, sizes: tuple[int, int, int]) -> None:
    from conf.schema import ModelConf
    from kernels import dispatch
    from parallel.mesh import Mesh
    from parallel.model.load import build_decoder
    from parallel.model.source import open_source

    data, pipeline, tensor = sizes
    mesh = Mesh.build(launch, data=data, pipeline=pipeline, tensor=tensor)
    weights = open_source(ModelConf(path=str(source), dtype="float32"))
    stages = [weights.architecture.num_layers] if pipeline == 1 else [1, weights.architecture.num_layers - 1]
    ops = dispatch.select(torch.device("cpu"), torch.float32)
    decoder = build_decoder(weights, mesh, stages, dtype=torch.float32, ops=ops, trainable=True)
    mine = [checkpoint.Block(spec, p) for spec, p in decoder.placed()]
    checkpoint.save(target, [checkpoint.TensorFile("model.safetensors", mine, {"format": "pt"})], {}, mesh)


def test_a_full_checkpoint_opens_in_transformers_with_our_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from conf.schema import ModelConf
    from parallel.model.source import open_source
    from tests.unit.test_decoder import our_model, packed_step

    run(tmp_path, "tensor3", "full", 3)
    latest = tmp_path / "run" / "checkpoints" / "latest"
    theirs = AutoModelForCausalLM.from_pretrained(latest, dtype=torch.float32)
    source = open_source(ModelConf(path=str(latest), dtype="float32"))
    text = "What is a mesh?"
    ids = source.tokenizer().encode(text)
    assert AutoTokenizer.from_pretrained(latest)(text)["input_ids"] == ids
    decoder = our_model(source, torch.float32)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        ours = decoder.logits(decoder(torch.tensor(ids), packed_step(decoder, (len(ids),))))
        expected = theirs(torch.tensor([ids])).logits[0]
    assert torch.allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("point", ["before_files", "amid_files", "before_rename"])
def test_a_crash_while_saving_leaves_the_last_checkpoint(tmp_path: Path, point: str) -> None:
    run(tmp_path, "data2", "lora", 2)
    before = tensors(tmp_path)
    latest = tmp_path / "run" / "checkpoints" / "latest"
    with pytest.raises(AssertionError, match=r"died|failed"):
        on_ranks(2, _crash_amid_save, tmp_path, point)
    assert os.readlink(latest) == "step-2"
    after = tensors(tmp_path)
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    run(tmp_path, "data2", "lora", 4)
    assert len(losses(tmp_path / "run")) == 4
    assert os.readlink(latest) == "step-4"
    assert sorted(path.name for path in latest.parent.iterdir()) == ["latest", "step-2", "step-4"]


def _crash_amid_save(launch, folder: Path, point: str) -> None:
    from tests.commands import train_rank

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if launch.rank == 0:
        module, target = {
            "before_files": (directory, "_write_file"),
            "amid_files": (blocks, "write_block"),
            "before_rename": (directory, "publish"),
        }[point]
        setattr(module, target, die)
    _, keys = LAYOUTS["data2"]
    train_rank(
        launch,
        [
            "model=tiny", f"data.path={folder / 'chats.jsonl'}", f"run_dir={folder / 'run'}", "optim.lr=0.003",
            "train.batch_size=6", "optim.schedule=cosine", "optim.decay_steps=8", "train.steps=4",
            *TUNES["lora"], *keys,
        ],
    )  # fmt: skip


@pytest.mark.parametrize("tune", ["full", "lora", "prefix"])
def test_what_inspect_says(tmp_path: Path, tune: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "alone", tune, 2)
    latest = tmp_path / "run" / "checkpoints" / "latest"
    assert main(["verify", str(latest)]) == 0
    assert main(["inspect", str(latest)]) == 0
    text = capsys.readouterr().out
    assert {"full": "model, llama", "lora": "adapter, LORA", "prefix": "adapter, PREFIX_TUNING"}[tune] in text
    assert "step       2 of 2" in text
    assert "12 rows done, 6 a step" in text
    assert "adamw, 2 updates, lr 0.003" in text
    trained = {name: tensor for name, tensor in tensors(tmp_path).items() if not name.startswith("optimizer")}
    elements = sum(tensor.numel() for tensor in trained.values())
    row = next(line.split() for line in text.splitlines() if line.split()[:2] == ["1", "1"])
    assert row[-2:] == contents._size(8 * elements).split()


def test_a_fresh_start_in_an_old_run_dir_never_goes_on_from_the_old_run(tmp_path: Path) -> None:
    run(tmp_path, "alone", "lora", 3)
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoint.begin(checkpoints, None)
    assert not (checkpoints / "latest").is_symlink()
    checkpoint.begin(checkpoints, checkpoints / "step-3")
    assert os.readlink(checkpoints / "latest") == "step-3"


def test_keeping_the_newest_looks_at_this_run_alone(tmp_path: Path) -> None:
    for name in ("step-5", "step-10", "step-20", "step-90", "step-100", "step-20-copy"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest").symlink_to("step-20")
    checkpoint.keep_newest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest", "step-10", "step-100", "step-20", "step-20-copy", "step-90",
    ]  # fmt: skip


def test_a_dangling_latest_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    run(tmp_path, "alone", "lora", 2)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-2").rename(checkpoints / ".step-2.old.partial")
    with pytest.raises(AssertionError, match="rename it back"):
        run(tmp_path, "alone", "lora", 4)
