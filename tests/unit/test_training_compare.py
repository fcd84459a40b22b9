"""The comparison of trainers: its arithmetic, its page, its inputs, and how it watches a contender."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conf.schema import Architecture, CompareConfig, ConfigError, DataConf, ModelConf
from parallel.model.source import open_source
from train.compare.__main__ import check, main, ours
from train.compare.cases import LAYOUTS, LENGTH, ROWS, SHAPES, TOKENS, Job, flops, refusal
from train.compare.inputs import write_inputs
from train.compare.launch import Failed, Measured, Memory, importable, measure, versions
from train.compare.report import Row, tables
from train.data import Dataset

SHAPE = Architecture(
    num_layers=3,
    width=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    ffn_width=5,
    vocab_size=11,
    max_positions=LENGTH,
)
WEIGHTS = 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 5) + 11 * 8  # q, k and v, o, the feed-forward; the head
ATTENTION = 3 * 8 * LENGTH / 2  # layers x width of all heads x keys of an average query


def job(**fields) -> Job:
    base = Job(
        model="m", ids="i", metrics="r/metrics.jsonl", shape="small", layout="single", dtype="float32",
        microbatch_rows=1, steps=2,
    )  # fmt: skip
    return replace(base, **fields)


def measured(*seconds: float, losses: tuple[float, ...] = (2.0, 1.0), memory: int = 0) -> Measured:
    return Measured(seconds, losses, Memory(memory, 2 * memory))


def row(layout: str = "single", **measurements: Measured | list[Measured]) -> Row:
    rounds = {who: one if isinstance(one, list) else [one] for who, one in measurements.items()}
    return Row("small", "float32", layout, 1e12, rounds)


def test_flops_count_the_products_of_forward_and_backward():
    assert flops(SHAPE, LAYOUTS["single"]) == TOKENS * (6 * WEIGHTS + 12 * ATTENTION)
    assert flops(SHAPE, LAYOUTS["tensor"]) == flops(SHAPE, LAYOUTS["single"])
    assert flops(SHAPE, LAYOUTS["lora"]) == TOKENS * (4 * WEIGHTS + 12 * ATTENTION)
    assert flops(SHAPE, LAYOUTS["prefix"]) == TOKENS * (4 * WEIGHTS + 12 * (ATTENTION + 3 * 8 * 20))


def test_layouts_that_peers_refuse_are_those_that_do_not_divide():
    assert refusal(job(layout="tensor")) is None
    assert refusal(job(layout="tensor", shape="smol")) == "can't: 9 heads on 2 ranks"
    assert refusal(job(layout="pipeline", shape="smol")) is None


def test_speed_is_that_of_the_median_step_over_all_rounds():
    one = row(onemesh=[measured(1.0, 2.0), measured(4.0)], torch=measured(3.0), megatron=measured(2.5, 8.0))
    assert one.speed("onemesh") == TOKENS / 2
    assert one.ratio == pytest.approx(3 / 2)  # PyTorch is the faster one: 3 s against 5.25 s
    share = flops(SHAPES["small"], LAYOUTS["single"]) / 2 / 1e12
    assert one.peak_share == pytest.approx(share)
    assert row(onemesh=measured(1.0)).ratio is None
    assert row(torch=measured(1.0)).ratio is None


def test_losses_must_fall_and_start_equal():
    assert row(onemesh=measured(1.0), torch=measured(1.0)).problems() == []
    assert row(onemesh=measured(1.0, losses=(2.0, 2.0))).problems() == [
        "small, float32, single: onemesh: the loss goes from 2.0000 to 2.0000"
    ]
    other = measured(1.0, losses=(2.001, 1.0))
    assert row(onemesh=measured(1.0), torch=other).problems() == [
        "small, float32, single: torch: the first loss is 2.00100, ours 2.00000"
    ]
    assert row("prefix", onemesh=measured(1.0), peft=other).problems() == []
    assert "nan" in str(row(onemesh=measured(1.0), torch=measured(1.0, losses=(float("nan"), 1.0))).problems())


def test_the_page_has_every_contender_and_says_why_one_has_no_figure():
    first = row(onemesh=measured(1.0, 2.0, memory=3 * 10**6), torch=measured(4.0, memory=10**6))
    first.absent["megatron"] = "not installed"
    second = row("tensor", onemesh=measured(1.0))
    second.absent |= {"megatron": "failed: rank 1 ended after 0 steps: x", "torch": "can't: 9 heads on 2 ranks"}
    text = tables([first, second])
    assert "## small, float32" in text
    assert "| layout | onemesh | Megatron-core | PyTorch | onemesh / best peer | GEMM peak, GFLOP/s |" in text
    share = round(first.peak_share * 100)
    assert f"| single | 2731 (2048-4096) | not installed | 1024 | 2.67 | {share}% of 1000 |" in text
    assert "| single | 3 / 6 | not installed | 1 / 2 |" in text
    assert "| tensor | 4096 | failed | can't | - |" in text
    assert "tensor, megatron: failed: rank 1 ended after 0 steps: x." in text
    assert "tensor, torch: can't: 9 heads on 2 ranks." in text


def test_unknown_names_are_told_at_once(capsys):
    with pytest.raises(ConfigError) as refused:
        check(CompareConfig(shapes=("smal",), layouts=(), peers=("apex",), microbatch_rows=3))
    assert str(refused.value).splitlines() == [
        "shapes=smal is not one of small, smol, tiny",
        "layouts=[] leaves nothing to measure; choose among single, data, tensor, pipeline, lora, prefix",
        "peers=apex is not one of megatron, torch, deepspeed, peft",
        "microbatch_rows=3 must divide the 4 rows of a data rank",
    ]
    assert main(["dtypes=[fp8]"]) == 2
    assert capsys.readouterr().err == "dtypes=fp8 is not one of bfloat16, float32\n"
    check(CompareConfig(peers=()))


def test_our_command_trains_what_the_job_says(tmp_path):
    inputs = write_inputs(tmp_path, SHAPE)
    command = ours(job(layout="data", dtype="bfloat16", microbatch_rows=2), inputs)
    assert command[:3] == [sys.executable, "-m", "train"]
    assert {"tune=full", "parallel.data=2", "parallel.microbatches=2", "model.dtype=bfloat16"} <= set(command)
    assert "tune.rank=8" in ours(job(layout="lora"), inputs)


def test_every_contender_reads_the_same_rows_and_weights(tmp_path):
    inputs = write_inputs(tmp_path, SHAPE)
    source = open_source(ModelConf(path=str(inputs.model)))
    rows, _ = Dataset.load(str(inputs.rows), source.tokenizer(), DataConf(max_length=LENGTH, loss_on="all"))
    ids_BT = load_file(inputs.ids)["ids"]
    assert ids_BT.shape == (ROWS, LENGTH)
    assert torch.equal(torch.from_numpy(rows.ids).long().reshape(ROWS, LENGTH), ids_BT)
    assert rows.num_targets == ROWS * (LENGTH - 1)
    weights = load_file(inputs.model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(source.read(name, (slice(1, 3), slice(0, 8)), torch.float32), weights[name][1:3])


CONTENDER = """
import json, os, sys, time
told = f"{sys.argv[1]}.{os.environ['RANK']}"
open(told + ".part", "w").write(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")
os.replace(told + ".part", told)  # whole or not at all: it may be killed at any time
held = bytearray(64 << 20)
for i in range(0, len(held), 4096): held[i] = 1
for step in range(1, 4):
    time.sleep(0.1)
    if os.environ["RANK"] == "0":
        record = {"step": step, "loss": 5 - step, "tokens": 8, "tokens_per_second": 8 / step}
        print(json.dumps(record), file=open(sys.argv[1], "a"))
time.sleep(60)
"""


def test_a_contender_is_measured_over_its_ranks_and_ended(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    found = measure([sys.executable, "-c", CONTENDER, str(metrics)], 2, metrics, 3, tmp_path)
    assert found.losses == (4, 3, 2)
    assert found.seconds == pytest.approx((2, 3))  # without the warm-up
    assert 2 * (64 << 20) < found.memory.anonymous <= found.memory.resident < 4 * (64 << 20)
    told = [(tmp_path / f"metrics.jsonl.{rank}") for rank in range(2)]
    assert told[0].exists()  # the other rank may not have come so far
    for file in filter(Path.exists, told):
        pid, threads = file.read_text().split()
        assert int(threads) == max(1, len(os.sched_getaffinity(0)) // 2)
        assert not Path(f"/proc/{pid}").exists()


def test_a_contender_that_ends_early_fails_with_its_last_line(tmp_path):
    code = "import os, sys, time; os.environ['RANK'] == '0' or sys.exit('no heads\\n'); time.sleep(60)"
    with pytest.raises(Failed, match=r"^rank 1 ended after 0 steps: no heads$"):
        measure([sys.executable, "-c", code], 2, tmp_path / "metrics.jsonl", 2, tmp_path)


def test_what_an_interpreter_has_is_found_without_importing_it():
    assert importable(sys.executable, "torch")
    assert not importable(sys.executable, "no_such_trainer.core")
    assert versions(sys.executable, ["torch", "no-such-trainer"]) == [f"torch {torch.__version__}"]


def test_a_job_survives_its_file(tmp_path):
    job(layout="lora").write(tmp_path / "job.json")
    assert Job.read(str(tmp_path / "job.json")) == job(layout="lora")
    assert json.loads((tmp_path / "job.json").read_text())["layout"] == "lora"
