"""Traces of pipelines: what is written is read and drawn; what is damaged or incomplete is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.schema import ConfigError
from parallel.pipeline import show
from parallel.pipeline.plan import Plan
from parallel.pipeline.schedules import make
from parallel.pipeline.timeline import Costs, bubble, timeline
from parallel.pipeline.trace import Writer, read

COSTS = Costs(forward=(1.0, 2.0, 1.0, 3.0), input=(1.0, 1.5, 1.0, 1.0), weight=0.5, message=0.25)


def write(run_dir: Path, plan: Plan, steps: int) -> None:
    """A run that does what the plan predicts, in milliseconds after some start."""
    for stage, row in enumerate(timeline(plan, COSTS)):
        writer = Writer(run_dir, stage)
        for step in range(1, steps + 1):
            for span in row:
                writer.note(span.action, 50 + step + span.start / 1e3, 50 + step + span.end / 1e3)
            writer.step(step, plan)


@pytest.fixture(params=["interleaved", "zbv"])
def plan(request: pytest.FixtureRequest) -> Plan:
    return make(request.param, 2, 5)


def test_what_was_written_is_read(tmp_path: Path, plan: Plan) -> None:
    write(tmp_path, plan, 3)
    trace = read(tmp_path)
    assert (trace.step, trace.plan) == (3, plan)
    for found, expected in zip(trace.rows, timeline(plan, COSTS), strict=True):
        assert [span.action for span in found] == [span.action for span in expected]
        assert [span.start for span in found] == pytest.approx([span.start for span in expected])
        assert [span.end for span in found] == pytest.approx([span.end for span in expected])
    costs = trace.costs()
    assert costs.forward == pytest.approx(COSTS.forward)
    split = plan.placement == "vee"
    assert costs.input == pytest.approx(COSTS.input if split else [1.5, 2.0, 1.5, 1.5])
    assert costs.weight == pytest.approx([0.5 * split] * 4)
    assert bubble(trace.plan, costs) < show.measured("", trace.rows, show.planned("", plan, costs)).bubble  # messages


def test_a_step_that_not_all_have_written_does_not_count(tmp_path: Path, plan: Plan) -> None:
    write(tmp_path, plan, 3)
    file = tmp_path / "trace" / "stage-1.jsonl"
    file.write_text(file.read_text()[:-30])
    assert read(tmp_path).step == 2
    file.write_text("")
    with pytest.raises(ConfigError, match="no step is in all of the 2 files"):
        read(tmp_path)
    file.write_text('{"step": 1, "placement": "loop", "actions": [["X0", 1, 2]]}\n')
    with pytest.raises(ConfigError, match=r"stage-1.jsonl:1 is damaged \(X0 is not an action"):
        read(tmp_path)
    file.write_text(json.dumps({"step": 3, "placement": "loop", "actions": [["F0", 51, 52]]}) + "\n")
    with pytest.raises(ConfigError, match="step 3 of trace is no whole schedule"):
        read(tmp_path)
    with pytest.raises(ConfigError, match=r"train with parallel\.trace=true"):
        read(tmp_path / "trace")


def test_it_is_drawn_below_its_plan(tmp_path: Path, plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, plan, 1)
    for name in ("", "x.svg", "x.png"):
        out = [f"out={tmp_path / name}"] if name else []
        assert show.main([f"trace={tmp_path}", *out]) == 0
        text = capsys.readouterr().out
        assert "measured" in text and "predicted" in text and "in-flight peak" in text
    svg = (tmp_path / "x.svg").read_text()
    assert "step 1: planned" in svg and "step 1: measured" in svg
    assert show.main([f"trace={tmp_path}", "stages=3"]) == 2
    assert f"stages=3 has no effect with trace={tmp_path}; remove one of them" in capsys.readouterr().err
    assert show.main([f"trace={tmp_path / 'nothing'}"]) == 2
    assert "train with parallel.trace=true" in capsys.readouterr().err
