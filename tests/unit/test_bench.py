"""The load generator's plans and figures; what it sends is tested against a server in tests/e2e."""

import math

import pytest

from conf.schema import BenchConfig, ConfigError
from serve.arrivals import Arrival, plan
from serve.bench import Outcome, fit, quantile, summary, table
from serve.sse import Server

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,0,55
"""


def times(config: BenchConfig) -> list[float]:
    return [arrival.time for arrival in plan(config)]


def test_requests_come_at_once_or_at_fixed_gaps():
    assert times(BenchConfig(requests=3)) == [0, 0, 0]
    assert times(BenchConfig(requests=3, rate=4.0)) == [0, 0.25, 0.5]
    assert plan(BenchConfig(requests=1, input_tokens=5, output_tokens=7)) == [
        Arrival(time=0, input_tokens=5, output_tokens=7)
    ]


def test_an_azure_trace_keeps_gaps_and_lengths(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    arrivals = plan(BenchConfig(trace=str(path)))
    assert [round(arrival.time, 6) for arrival in arrivals] == [0, 4.314579, 4.541877]
    assert [(a.input_tokens, a.output_tokens) for a in arrivals] == [(374, 44), (396, 109), (1, 55)]
    scaled = plan(BenchConfig(trace=str(path), requests=2, time_scale=0.5, length_scale=0.1))
    assert [round(arrival.time, 6) for arrival in scaled] == [0, 2.15729]
    assert [(a.input_tokens, a.output_tokens) for a in scaled] == [(37, 4), (40, 11)]


def test_a_mooncake_trace_is_in_milliseconds_and_sorted(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 4500, "input_length": 9, "output_length": 3, "hash_ids": [1]}\n'
        '{"timestamp": 3000, "input_length": 8, "output_length": 2, "hash_ids": [2]}\n'
    )
    assert plan(BenchConfig(trace=str(path))) == [
        Arrival(time=0.0, input_tokens=8, output_tokens=2),
        Arrival(time=1.5, input_tokens=9, output_tokens=3),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,5\n", r"t\.csv:2: .*'GeneratedTokens' is missing"),
        ("t.csv", AZURE + "yesterday,1,2\n", r"t\.csv:5: .*yesterday"),
        ("t.csv", AZURE + "2023-11-16 18:15:46,-1,2\n", r"t\.csv:5: .*negative length"),
        ("t.jsonl", '{"timestamp": 1}\n', r"t\.jsonl:1: .*'input_length' is missing"),
        ("t.jsonl", "{\n", r"t\.jsonl:1: "),
        ("t.jsonl", "[1]\n", r"t\.jsonl:1: "),
        ("t.csv", "", "holds no request"),
        ("t.txt", "", r"must be a \.csv or a \.jsonl file"),
    ],
)
def test_a_bad_trace_is_an_error_with_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        plan(BenchConfig(trace=str(tmp_path / name)))


def test_a_missing_trace_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        plan(BenchConfig(trace=str(tmp_path / "none.csv")))


def test_a_real_trace_reads_whole(real_data):
    arrivals = plan(BenchConfig(trace=str(real_data / "trace/AzureLLMInferenceTrace_conv_2023.csv"), requests=20000))
    assert len(arrivals) == 19366
    assert round(sum(a.input_tokens for a in arrivals) / len(arrivals)) == 1155
    assert round(sum(a.output_tokens for a in arrivals) / len(arrivals)) == 211
    assert 5.4 < len(arrivals) / arrivals[-1].time < 5.6


def test_lengths_are_cut_to_the_context_answers_first():
    long = [Arrival(time=0, input_tokens=i, output_tokens=o) for i, o in ((5, 5), (8, 5), (1, 50))]
    cut, count = fit(long, 10)
    assert [(a.input_tokens, a.output_tokens) for a in cut] == [(5, 5), (5, 5), (1, 9)]
    assert count == 2
    assert fit(long, None) == (long, 0)


def test_quantiles_lie_between_neighbours():
    values = [0.0, 1.0, 2.0, 4.0]
    assert [quantile(values, share) for share in (0, 0.5, 1)] == [0.0, 1.5, 4.0]
    assert math.isclose(quantile(values, 0.9), 3.4)
    assert quantile([3.0], 0.99) == 3.0
    assert quantile([], 0.5) is None


def test_figures_come_from_good_requests_and_errors_are_counted():
    outcomes = [
        Outcome(due=0.0, pieces=[1.0, 1.5, 2.5], end=3.0, input_tokens=10, output_tokens=3),
        Outcome(due=1.0, pieces=[2.0, 2.1], end=2.2, input_tokens=20, output_tokens=2),
        Outcome(due=0.0, pieces=[9.0], end=9.0, error="503: full"),
        Outcome(due=0.0, error="503: full"),
    ]
    figures = summary(outcomes, 5.0)
    assert figures["errors"] == {"503: full": 2}
    assert (figures["input_tokens"], figures["output_tokens"]) == (30, 5)
    assert (figures["output_tokens_per_second"], figures["requests_per_second"]) == (1.0, 0.4)
    assert figures["first_token"]["mean"] == 1.0
    assert figures["inter_token"]["p50"] == 0.5
    assert math.isclose(figures["request"]["mean"], (3.0 + 1.2) / 2)
    text = table(figures)
    assert "4 requests in 5.00 s, 2 of them failed" in text
    assert "2 x 503: full" in text
    assert "500.0" in text


def test_figures_of_a_run_without_success_are_dashes():
    text = table(summary([Outcome(due=0.0, error="no")], 1.0))
    assert text.count("-") >= 12
    assert "0.0" in text


def test_urls():
    assert Server.at("http://127.0.0.1:8000/v1/", None) == Server(host="127.0.0.1", port=8000)
    assert Server.at("localhost:81", "k") == Server(host="localhost", port=81, api_key="k")
    for url in ("https://a", "ftp://a", "http://", "http://a/b/c"):
        with pytest.raises(ValueError, match="must look like"):
            Server.at(url, None)
