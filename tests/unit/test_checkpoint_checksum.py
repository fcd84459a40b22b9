"""Checksums don't show how bytes were cut, and tell damage; `python -m parallel.checkpoint` names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel import checkpoint
from parallel.checkpoint import Block, TensorFile
from parallel.checkpoint.__main__ import main
from parallel.checkpoint.checksum import FILE, Checksum, _factor, _table
from parallel.mesh import Mesh
from parallel.sharding import Spec, whole


def plain(data: bytes) -> int:
    """By the formula, word by word."""
    data += bytes(-len(data) % 4)
    total = 0
    for number in range(len(data) // 4):
        word = int.from_bytes(data[4 * number : 4 * number + 4], "little")
        total += word * coefficient(number)
    return total % 2**64


def coefficient(number: int) -> int:
    a, b = _table()[:, number // 2 % 32768].tolist()
    factor = _factor(number // 2 // 32768)
    return (a * factor if number % 2 == 0 else (2**32 * a + b) * factor) % 2**64


def checksum(data: bytes, cuts: list[int]) -> int:
    total = Checksum()
    for first, last in zip([0, *cuts], [*cuts, len(data)], strict=True):
        total.add(first, np.frombuffer(data[first:last], dtype=np.uint8))
    return total.value()


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=6))
def test_any_cut_gives_the_formulas_sum(data: bytes, cuts: list[int]) -> None:
    cuts = sorted(min(cut, len(data)) for cut in cuts)
    assert checksum(data, cuts) == plain(data)


@pytest.mark.parametrize("seed", range(4))
def test_ranks_sums_add_up_over_large_and_small_runs(seed: int) -> None:
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, 1_200_003, dtype=np.uint8)
    cuts = np.sort(random.choice(len(data), 300, replace=False)).tolist()
    cuts = [*cuts, *range(700_001, 700_900, 3)]
    cuts.sort()
    ranks = [Checksum() for _ in range(3)]
    for first, last in zip([0, *cuts], [*cuts, len(data)], strict=True):
        ranks[int(random.integers(3))].add(first, data[first:last])
    assert sum(rank.value() for rank in ranks) % 2**64 == plain(data.tobytes())


def test_every_changed_bit_and_any_two_change_the_sum() -> None:
    """Two changes cancel only if they are each other's negative; the sums of single ones must differ up to sign."""
    data = np.random.default_rng(0).integers(0, 256, 1003, dtype=np.uint8)
    whole, changes = plain(data.tobytes()), set()
    for bit in range(8 * len(data)):
        changed = data.copy()
        changed[bit // 8] ^= 1 << bit % 8
        change = (checksum(changed.tobytes(), []) - whole) % 2**64
        changes |= {change, -change % 2**64}
    assert len(changes) == 2 * 8 * len(data)
    assert 0 not in changes


def test_factors_are_odd_and_their_own() -> None:
    found = {coefficient(number) for number in range(0, 400_000, 3)}
    assert len(found) == len(range(0, 400_000, 3))
    assert all(number % 2 for number in found)


def save(directory: Path) -> Path:
    """Two files, the second with two tensors of 48 and 40 bytes."""
    torch.manual_seed(0)

    def block(name: str, *shape: int) -> Block:
        return Block(Spec(name=name, shape=shape, index=whole(shape), owned=whole(shape)), torch.randn(shape))

    files = [
        TensorFile("model.safetensors", [block("norm", 5)], {"format": "pt"}),
        TensorFile("train_state/optimizer.safetensors", [block("a", 3, 4), block("b", 10)], {}),
    ]
    checkpoint.save(directory, files, {"train_state/state.json": "{}"}, Mesh.single())
    return directory


def test_a_checkpoint_as_it_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save(tmp_path / "step-1")
    assert main(["verify", str(directory)]) == 0
    assert capsys.readouterr().out == f"{directory}: 3 tensors in 2 files are as they were saved\n"
    assert list(json.loads((directory / FILE).read_text())["files"]) == [
        "model.safetensors",
        "train_state/optimizer.safetensors",
    ]


def test_damaged_truncated_and_missing_tensors_are_named_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = save(tmp_path / "step-1")
    optimizer = directory / "train_state/optimizer.safetensors"
    raw = bytearray(optimizer.read_bytes()[:-4])
    raw[-60] ^= 1
    optimizer.write_bytes(raw)
    sums = json.loads((directory / FILE).read_text())
    sums["files"]["model.safetensors"]["gone"] = "0"
    (directory / FILE).write_text(json.dumps(sums))
    (directory / "train_state/state.json").write_text("{")
    assert main(["verify", str(directory)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"{directory}:"
    assert lines[1] == "  train_state/state.json is damaged: it is no JSON"
    assert lines[2] == "  model.safetensors: gone is missing"
    assert lines[3].startswith("  train_state/optimizer.safetensors: a is damaged")
    assert lines[4].startswith("  train_state/optimizer.safetensors: b is truncated: it ends at byte ")
    assert len(lines) == 5
    (directory / "model.safetensors").unlink()
    assert main(["verify", str(directory)]) == 1
    assert "model.safetensors is missing, and with it 2 tensors" in capsys.readouterr().err


def test_what_has_no_checksums_is_said_to_have_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save(tmp_path / "step-1")
    (directory / FILE).unlink()
    assert main(["verify", str(directory)]) == 1
    assert f"has no {FILE}" in capsys.readouterr().err
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert main(["verify", str(directory)]) == 1
    assert "1 bytes follow the last tensor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: "),
        (["verify"], "usage: "),
        (["look", "."], "usage: "),
        (["verify", "/nowhere"], "/nowhere is not a directory; give a checkpoint"),
        (["verify", "."], "holds no .safetensors file; give a checkpoint"),
        (["inspect", "."], "holds no .safetensors file; give a checkpoint"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
