"""A rank that dies ends the run with a line that names it; a run that is asked to stop saves and goes on later."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from parallel.comm import Launch
from tests.commands import losses, metrics, run_rank, train_rank, write_chats
from tests.processes import Command, is_alive, running
from tests.ranks import on_ranks

STEPS = 24
FAST_S = 30.0
"""All ranks must have ended this long after one has died."""


def arguments(folder: Path, *more: str) -> list[str]:
    """A LoRA run of the tiny model in `folder`/run."""
    data = folder / "chats.jsonl"
    if not data.exists():
        write_chats(data)
    return [
        "model=tiny", "tune=lora", "tune.dropout=0.1", f"data.path={data}", f"run_dir={folder / 'run'}",
        "train.batch_size=6", "optim.lr=0.003", "optim.schedule=cosine", f"train.steps={STEPS}", *more,
    ]  # fmt: skip


def steps_done(folder: Path) -> int:
    """Lines of metrics.jsonl."""
    path = folder / "run" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_steps(command: Command, folder: Path, count: int) -> None:
    """Returns in the middle of a run."""
    deadline = time.monotonic() + 120
    while steps_done(folder) < count:
        assert command.process.poll() is None, command.text
        assert time.monotonic() < deadline, command.text
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("ranks", "layout", "victim"),
    [(2, ["parallel.tensor=2"], 0), (3, ["parallel.pipeline=3"], 1)],
    ids=["tensor2_first_rank", "pipeline3_middle_rank"],
)
def test_all_ranks_end_when_one_is_killed(tmp_path: Path, ranks: int, layout: list[str], victim: int) -> None:
    with running(tmp_path, "train", *arguments(tmp_path, *layout, "train.steps=100000"), ranks=ranks) as command:
        wait_for_steps(command, tmp_path, 3)
        pids = [command.rank(number) for number in range(ranks)]
        os.kill(pids[victim], signal.SIGKILL)
        killed = time.monotonic()
        assert command.wait(FAST_S) not in (0, 2, 75)
        assert time.monotonic() - killed < FAST_S
        assert not any(is_alive(pid) for pid in pids)
        lines = [line for line in command.text.splitlines() if line.startswith("train: [rank ")]
        assert any(f"failed: lost rank {victim}" in line for line in lines), command.text
        assert command.text.count("Traceback (most") == 1, command.text  # torchrun's own


def _threads_left(launch: Launch, module: str, options: list[str]) -> list[str]:
    """Names of gloo's threads after a command that ended well."""
    assert _gloo_threads(), "the threads have other names: this test sees nothing"
    code, printed = run_rank(launch, module, options)
    assert code == 0, printed
    return _gloo_threads()


def _gloo_threads() -> list[str]:
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


@pytest.mark.parametrize("axis", ["data", "pipeline", "tensor"])
def test_no_thread_of_the_group_outlives_training(tmp_path: Path, axis: str) -> None:
    # one that does may abort the process while Python shuts down
    options = arguments(tmp_path, "train.steps=2", f"parallel.{axis}=2")
    assert on_ranks(2, _threads_left, "train.__main__", options) == [[], []]


def test_no_thread_of_the_group_outlives_serving() -> None:
    assert on_ranks(2, _threads_left, "serve.generate", ["model=tiny", "prompt=hello", "max_tokens=4"]) == [[], []]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    assert on_ranks(2, _run_and_signal, arguments(folder), folder, None, 0)[0][0] == 0
    assert len(losses(folder / "run")) == STEPS
    return folder


def _run_and_signal(
    launch: Launch, options: list[str], folder: Path, number: int | None, receiver: int
) -> tuple[int, str]:
    """Trains; the rank `receiver` gets the signal once three steps are done."""

    def send() -> None:
        while steps_done(folder) < 3:
            time.sleep(0.005)
        os.kill(os.getpid(), number or 0)

    if number is not None and launch.rank == receiver:
        threading.Thread(target=send, daemon=True).start()
    return train_rank(launch, options)


def assert_went_on(folder: Path, whole: Path) -> None:
    """One line per step, losses and weights bit for bit those of the run that nobody stopped."""
    assert losses(folder / "run") == losses(whole / "run")
    latest = "run/checkpoints/latest"
    assert os.readlink(folder / latest) == f"step-{STEPS}"
    for name in ("adapter_model.safetensors", "train_state/optimizer.safetensors"):
        found, expected = load_file(folder / latest / name), load_file(whole / latest / name)
        assert found.keys() == expected.keys()
        assert all(tensor.equal(found[key]) for key, tensor in expected.items())


@pytest.mark.parametrize(
    ("number", "receiver"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)], ids=["SIGTERM_rank0", "SIGUSR1_rank1"]
)
def test_a_signal_to_any_rank_saves_and_the_same_command_goes_on(
    tmp_path: Path, uninterrupted: Path, number: int, receiver: int
) -> None:
    options = [*arguments(tmp_path), "train.resume=auto"]
    results = on_ranks(2, _run_and_signal, options, tmp_path, int(number), receiver)
    assert [code for code, _ in results] == [75, 75]
    stopped = len(metrics(tmp_path / "run"))
    assert 3 <= stopped < STEPS
    assert os.readlink(tmp_path / "run/checkpoints/latest") == f"step-{stopped}"
    assert f"step {stopped}: asked to stop; the same command with train.resume=auto goes on from here" in results[0][1]

    code, printed = on_ranks(2, _run_and_signal, options, tmp_path, None, 0)[0]
    assert code == 0
    assert f"going on after step {stopped}" in printed
    assert_went_on(tmp_path, uninterrupted)


def test_the_process_exits_with_75_and_goes_on_under_another_layout(tmp_path: Path, uninterrupted: Path) -> None:
    options = arguments(tmp_path, "train.steps=400")
    with running(tmp_path, "train", *options) as command:
        wait_for_steps(command, tmp_path, 3)
        command.process.send_signal(signal.SIGTERM)
        assert command.wait(FAST_S) == 75
    stopped = len(losses(tmp_path / "run"))
    assert os.readlink(tmp_path / "run/checkpoints/latest") == f"step-{stopped}"
    more = stopped + 2
    code, printed = on_ranks(2, _run_and_signal, [*options, f"train.steps={more}"], tmp_path, None, 0)[0]
    assert code == 0, printed
    assert len(losses(tmp_path / "run")) == more


def test_torchrun_passes_a_signal_on_and_the_ranks_save(tmp_path: Path) -> None:
    with running(tmp_path, "train", *arguments(tmp_path, "train.steps=100000"), ranks=2) as command:
        wait_for_steps(command, tmp_path, 3)
        pids = [command.rank(number) for number in range(2)]
        command.process.send_signal(signal.SIGTERM)
        assert command.wait(FAST_S) != 0
        assert not any(is_alive(pid) for pid in pids)
        assert "asked to stop" in command.text
    stopped = len(losses(tmp_path / "run"))
    assert os.readlink(tmp_path / "run/checkpoints/latest") == f"step-{stopped}"
