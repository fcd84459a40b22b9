"""The load generator against a real server with a fake engine, and what the server spends on a token."""

import json
import os
from pathlib import Path

import pytest

from serve import bench
from tests.fake_engine import running


@pytest.fixture(scope="module")
def engine():
    with running(api_key="secret") as engine:
        yield engine


def arguments(engine, *more: str) -> list[str]:
    return [f"url={engine.url}", "api_key=secret", *more]


def test_a_burst_is_reported_as_text_and_as_json(engine, tmp_path, capsys):
    out = tmp_path / "report.json"
    seen = len(engine.seen)
    code = bench.main(arguments(engine, "requests=8", "input_tokens=50", "output_tokens=20", f"out={out}"))
    assert code == 0
    requests = engine.seen[seen:]
    assert [len(request.prompt) for request in requests] == [50] * 8
    assert len({request.prompt for request in requests}) == 8
    assert all(r.sampling.max_tokens == 20 and r.sampling.ignore_eos for r in requests)
    text = capsys.readouterr().out
    assert "8 requests in" in text
    assert "time to first token" in text
    report = json.loads(out.read_text())
    assert (report["input_tokens"], report["output_tokens"], report["errors"]) == (400, 160, {})
    assert report["model"] == "fake"
    assert 0 < report["inter_token"]["p50"] <= report["inter_token"]["p99"]


def test_the_same_seed_sends_the_same_prompts_at_the_given_rate(engine):
    more = ("requests=4", "rate=20", "input_tokens=5", "output_tokens=2", "model=tuned")
    seen = len(engine.seen)
    bench.main(arguments(engine, *more, "seed=3"))
    bench.main(arguments(engine, *more, "seed=3"))
    bench.main(arguments(engine, *more, "seed=4"))
    prompts = [request.prompt for request in engine.seen[seen:]]
    assert prompts[:4] == prompts[4:8]
    assert prompts[8:] != prompts[:4]
    assert engine.seen[-1].adapter == "tuned"


def test_a_trace_is_cut_to_the_context(engine, tmp_path, capsys):
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,5000,44\n2023-11-16 18:15:46.1,30,4\n"
    )
    seen = len(engine.seen)
    assert bench.main(arguments(engine, f"trace={trace}")) == 0
    assert [len(request.prompt) for request in engine.seen[seen:]] == [356, 30]
    assert "1 requests were cut to the model's context of 400 tokens" in capsys.readouterr().out


def test_failed_requests_are_counted_with_their_reason(engine, capsys, monkeypatch):
    monkeypatch.setattr(bench, "fit", lambda arrivals, _: (arrivals, 0))
    assert bench.main(arguments(engine, "requests=2", "input_tokens=500", "output_tokens=2")) == 1
    text = capsys.readouterr().out
    assert "2 of them failed" in text
    assert "2 x 400: the prompt has 500 tokens, but the model's context holds 400" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["url=http://8.8.8.8:80"], "url=http://8.8.8.8:80 is at 8.8.8.8: load goes to this machine"),
        (["url=http://127.0.0.1:9"], "no connection to 127.0.0.1:9"),
        (["url=https://127.0.0.1"], "must look like http://127.0.0.1:8000"),
        (["api_key=wrong"], "401: the API key is missing or wrong"),
        (["model=nobody"], "model=nobody is not served at"),
        (["requests=1000000"], "requests=1000000 must be at most 100000"),
        (["trace=/nowhere.csv"], "trace=/nowhere.csv can't be read"),
    ],
)
def test_mistakes_are_one_message_and_exit_2(engine, capsys, more, message):
    assert bench.main(arguments(engine, *more)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_64_streams_of_50_tokens_a_second_cost_a_fraction_of_a_core(engine, tmp_path):
    """Processor time, which a busy machine doesn't stretch much; measured: 50 us a token, 0.16 of a core."""
    out = tmp_path / "report.json"
    engine.step_seconds = 0.02
    before = cpu_seconds(engine.handle.process.pid)
    assert bench.main(arguments(engine, "requests=64", "input_tokens=100", "output_tokens=100", f"out={out}")) == 0
    spent = cpu_seconds(engine.handle.process.pid) - before
    engine.step_seconds = 0.0
    report = json.loads(out.read_text())
    assert report["output_tokens"] == 6400
    assert spent / 6400 < 200e-6
