"""The life of the API process: bound before it is ready, ended by the engine, by signals and by deaths."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from conf.schema import ConfigError
from parallel.model.tokenizer_bytes import byte_tokenizer
from serve import api
from serve.link import LinkClosed
from tests.fake_engine import READY, FakeEngine, eventually, health, running

USER = [{"role": "user", "content": "say x"}]


def wait_until(condition) -> None:
    assert eventually(condition), "it didn't happen"


def test_the_port_answers_starting_until_the_engine_is_ready():
    engine = FakeEngine()
    try:
        assert health(engine.url) == (503, "starting")
        refused = httpx.post(f"{engine.url}/v1/chat/completions", json={"messages": USER}, timeout=20)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "starting")
        assert httpx.get(f"{engine.url}/metrics").status_code == 200
        engine.ready()
        wait_until(lambda: health(engine.url) == (200, "ok"))
    finally:
        assert engine.stop() == 0


def test_an_engine_that_is_stopping_takes_no_new_requests():
    engine = FakeEngine()
    try:
        engine.handle.link.send({"ready": READY})
        wait_until(lambda: health(engine.url) == (200, "ok"))
        engine.handle.link.send({"stopping": True})
        wait_until(lambda: health(engine.url) == (503, "stopping"))
        refused = httpx.post(f"{engine.url}/v1/completions", json={"prompt": "x"}, timeout=20)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    finally:
        assert engine.stop() == 0


def test_the_api_process_never_loads_torch():
    code = "import sys, serve.server; print(sorted(m for m in sys.modules if m.split('.')[0] == 'torch'))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    with running() as engine:
        wait_until(lambda: health(engine.url) == (200, "ok"))
        httpx.post(f"{engine.url}/v1/chat/completions", json={"messages": USER}, timeout=20).raise_for_status()
        assert "libtorch" not in Path(f"/proc/{engine.handle.process.pid}/maps").read_text()


def test_the_saved_tokenizer_is_gone_once_it_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with running() as engine:
        wait_until(lambda: health(engine.url) == (200, "ok"))
        assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_one_clear_error_before_anything_starts():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port} can't be listened on at host=127") as caught:
            api.start(host="127.0.0.1", port=port, tokenizer=byte_tokenizer(), api_key=None)
        assert "in use" in str(caught.value)
    with pytest.raises(ConfigError, match=r"host=no\.such\.host\.invalid"):
        api.bind("no.such.host.invalid", 8000)


def test_the_port_is_free_again_at_once_after_a_stop():
    with running() as engine:
        port = engine.handle.port
        wait_until(lambda: health(engine.url)[0] == 200)
    api.bind("127.0.0.1", port).close()


def ask(engine: FakeEngine, prompt: str, answers: list[httpx.Response]) -> threading.Thread:
    """A request on a thread, which the engine has seen."""
    seen = len(engine.seen)
    body = {"prompt": prompt, "max_tokens": 300}
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{engine.url}/v1/completions", json=body, timeout=20))
    )
    thread.start()
    wait_until(lambda: len(engine.seen) > seen)
    return thread


def test_shutdown_ends_waiting_requests_with_a_503_and_exits_0():
    engine, answers = FakeEngine().ready(), []
    wait_until(lambda: health(engine.url)[0] == 200)
    thread = ask(engine, "wait", answers)
    start = time.monotonic()
    assert engine.stop() == 0
    thread.join(5)
    assert time.monotonic() - start < 5
    assert answers[0].status_code == 503
    assert "shutting down: the test is over" in answers[0].json()["error"]["message"]


def test_a_signal_stops_new_requests_and_lets_running_ones_finish():
    engine, answers = FakeEngine(step_seconds=0.01).ready(), []
    wait_until(lambda: health(engine.url)[0] == 200)
    thread = ask(engine, "count", answers)
    engine.handle.process.send_signal(signal.SIGTERM)
    assert engine.stop_asked.wait(5)
    assert health(engine.url) == (503, "stopping")
    refused = httpx.post(f"{engine.url}/v1/completions", json={"prompt": "say x"}, timeout=20)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
    thread.join(20)
    assert answers[0].json()["usage"]["completion_tokens"] == 300
    assert engine.stop() == 0


def test_a_second_signal_ends_the_process():
    engine = FakeEngine().ready()
    wait_until(lambda: health(engine.url)[0] == 200)
    engine.handle.process.send_signal(signal.SIGINT)
    assert engine.stop_asked.wait(5)
    engine.handle.process.send_signal(signal.SIGINT)
    assert engine.handle.process.wait(10) == 1
    engine.stop()


def test_the_engine_hears_of_the_death_of_the_api_process():
    engine = FakeEngine().ready()
    wait_until(lambda: health(engine.url)[0] == 200)
    engine.handle.process.kill()
    wait_until(lambda: engine.link_error is not None)
    assert "the API process has ended" in engine.link_error
    with pytest.raises(LinkClosed):
        engine.handle.link.send({"outputs": []})
    assert engine.stop() == -signal.SIGKILL


ENGINE = """
import os, time
from parallel.model.tokenizer_bytes import byte_tokenizer
from serve import api
handle = api.start(host="127.0.0.1", port=0, tokenizer=byte_tokenizer(), api_key=None)
if os.fork() == 0:
    time.sleep(20)  # a child of the engine that still holds the channel open
    os._exit(0)
handle.link.send({"ready": {"model_name": "m", "root": "m", "max_length": 9, "vocab_size": 9}})
print(handle.process.pid, handle.url, flush=True)
time.sleep(60)
"""


def test_the_api_process_ends_with_a_line_when_the_engine_dies():
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert engine.stdout is not None and engine.stderr is not None
    pid, url = engine.stdout.readline().split()
    wait_until(lambda: health(url)[0] == 200)
    os.kill(engine.pid, signal.SIGKILL)
    engine.wait(5)
    line = engine.stderr.readline()
    assert "onemesh API: the engine process has ended" in line
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    os.killpg(engine.pid, signal.SIGKILL)
    engine.stdout.close()
    engine.stderr.close()
