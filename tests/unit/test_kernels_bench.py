"""The benchmark of kernels: its tables on tiny shapes, and options that don't fit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.bench import attention, linear, timing
from kernels.documents import Documents
from tests.backends import backend

ROOT = Path(__file__).parents[2]
TINY = attention.Shape(heads=3, kv_heads=1, head_dim=8)


@pytest.mark.usefixtures("thread_counts")
def test_every_table_of_attention(monkeypatch):
    backend("compiled", torch.float32)
    monkeypatch.setattr(attention, "PACKS", ((TINY, (5, 3)),))
    monkeypatch.setattr(attention, "PREFILLS", ((TINY, ((4, 4), (2, 20))),))
    monkeypatch.setattr(attention, "DECODES", ((TINY, (40, 17)),))
    monkeypatch.setattr(attention, "_COLD_BYTES", 1000)
    monkeypatch.setattr(timing, "_READ_BYTES", 4096)
    text = timing.measure(attention.TABLES, [torch.float32], [1])
    for line in ("| 3/1 x 8 | 5 3 |", "| 3/1 x 8 | 4 of 4, 2 of 20 |", "| 3/1 x 8 | 2 x 200-400 |"):
        assert line in text
    assert text.count("float32, 1 thread:") == 3


@pytest.mark.usefixtures("thread_counts")
def test_every_table_of_linears(monkeypatch):
    backend("compiled", torch.float32)
    monkeypatch.setattr(linear, "LAYER", ((50, 8), (8, 50)))
    monkeypatch.setattr(linear, "LAYERS", 2)
    monkeypatch.setattr(linear, "HEAD", (20, 8))
    monkeypatch.setattr(linear, "TOKENS", 10)
    monkeypatch.setattr(timing, "_READ_BYTES", 4096)
    text = timing.measure(linear.TABLES, [torch.float32], [1])
    for line in ("| 1 |", "| forward, 512 rows |", "| 8 x 50 of w |"):
        assert line in text
    assert text.count("float32, 1 thread:") == 3


def test_both_sides_compute_the_same():
    """What is timed is one function: documents of as many queries as keys, and the last queries of longer ones."""
    backend("compiled", torch.float32)
    q, (_, k, v) = TINY.draw(9, torch.float32)[0], TINY.draw(25, torch.float32)
    theirs = torch.cat(attention._blocked(q, k, v, (5, 4), (5, 20), 0.3))
    documents = Documents(query_bounds=(0, 5, 9), key_bounds=(0, 5, 25), offsets=(0, 16))
    ours, _ = attention.cpu_attention.attention_varlen(q, k, v, documents, scale=0.3)
    torch.testing.assert_close(ours, theirs)


def test_medians_are_of_each_function_alone():
    calls = []
    seconds = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert set(seconds) == {"a", "b"} and min(seconds.values()) >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["gemm"], "invalid choice: 'gemm'"),
        (["attention", "--tables", "nothing"], "attention has training, prefill, decode, not nothing"),
        (["attention", "--isa", "avx9"], "invalid choice: 'avx9'"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    command = [sys.executable, "-m", "kernels.bench", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr
