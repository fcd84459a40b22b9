"""Jobs on a real two-node Slurm: training across nodes, stopping and going on, serving, refusing."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, install, missing_programs, wait

PROJECT = Path(__file__).parent.parent.parent
STEPS = 40
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes, up for all tests of this file."""
    if os.geteuid() != 0:
        pytest.skip("only root can start Slurm's daemons and give nodes a network of their own")
    if missing_programs() and os.environ.get("ONEMESH_APT") == "1":
        install()
    if missing := missing_programs():
        pytest.skip(f"no {', '.join(missing)}; ONEMESH_APT=1 lets this test install Slurm with apt-get")
    # Slurm's sockets need a short path, which tmp_path is not.
    folder = Path(tempfile.mkdtemp(prefix="onemesh-slurm-"))
    cluster = Cluster(folder / "cluster")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat file whose path needs quotes in a shell."""
    path = tmp_path_factory.mktemp("data") / "a few, rows.jsonl"
    with path.open("w") as file:
        for i in range(24):
            answer = "It is a number. " * (1 + i % 5)
            turns = [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def training(rows: Path) -> list[str]:
    """The arguments of a small run that needs two ranks."""
    options = [
        "model=tiny",
        "parallel.tensor=2",
        "train.batch_size=4",
        f"train.steps={STEPS}",
        "optim.lr=1e-3",
    ]
    return [*options, f"data.path={rows}", "run_dir=my run"]


@pytest.fixture(scope="module")
def reference(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of that run without Slurm, both ranks on this machine."""
    folder = tmp_path_factory.mktemp("reference")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "train"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    command = [*torchrun, *training(rows)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return [record["loss"] for record in metrics(folder)]


class Job:
    """A submitted job, and the file its output goes to."""

    def __init__(self, cluster: Cluster, folder: Path, script: str, arguments: Sequence[str], **env: str) -> None:
        self._cluster = cluster
        # As a user who submits from another folder than the checkout.
        environment = {
            "ONEMESH_HOME": str(PROJECT),
            "ONEMESH_VENV": sys.prefix,
            "OMP_NUM_THREADS": "1",
            **env,
        }
        command = [
            "sbatch",
            "--parsable",
            "--nodes=2",
            "--output=out.txt",
            f"{PROJECT}/slurm/{script}",
            *arguments,
        ]
        self.id = int(cluster.run(command, cwd=folder, env=environment))
        self._file = folder / "out.txt"

    def output(self) -> str:
        return self._file.read_text() if self._file.exists() else ""

    def state(self) -> str:
        return self._cluster.state(self.id)

    def finish(self, seconds: float = 180) -> str:
        """Waits for the end; returns the last state."""
        wait(lambda: self.state() in OVER, seconds, lambda: self.output() + self._cluster.logs())
        return self.state()

    def signal(self, name: str) -> None:
        """Signals the batch script alone, as Slurm does before the time limit."""
        self._cluster.run(["scancel", "--batch", f"--signal={name}", str(self.id)])


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "my run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same(losses: Sequence[float], reference: Sequence[float]) -> bool:
    return list(losses) == pytest.approx(list(reference), rel=1e-6)


def test_two_nodes_train_as_without_slurm(cluster: Cluster, rows: Path, reference: list[float], tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "train.sbatch", training(rows))
    assert job.finish() == "COMPLETED", job.output()
    assert [record["step"] for record in metrics(tmp_path)] == list(range(1, STEPS + 1))
    assert same([record["loss"] for record in metrics(tmp_path)], reference)
    assert cluster.restarts(job.id) == 0


def test_a_run_asked_to_stop_saves_goes_back_into_the_queue_and_goes_on(
    cluster: Cluster, rows: Path, reference: list[float], tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, "train.sbatch", training(rows))
    wait(lambda: len(metrics(tmp_path)) >= 3, 120, job.output)
    job.signal("USR1")
    wait(lambda: cluster.restarts(job.id) == 1, 120, job.output)
    stopped_after = metrics(tmp_path)[-1]["step"]
    assert stopped_after < STEPS, "the run was over before it was asked to stop"
    assert job.finish() == "COMPLETED", job.output()
    assert cluster.restarts(job.id) == 1
    assert f"job {job.id} stopped on request after saving" in job.output()
    assert f"going on after step {stopped_after}" in job.output()
    assert [record["step"] for record in metrics(tmp_path)] == list(range(1, STEPS + 1))
    assert same([record["loss"] for record in metrics(tmp_path)], reference)
    assert not list(Path("/tmp").glob(f"onemesh-{job.id}.*"))


def test_a_run_that_fails_is_not_repeated(cluster: Cluster, rows: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "train.sbatch", [*training(rows), "parallel.pipelines=2"])
    assert job.finish() == "FAILED"
    assert cluster.restarts(job.id) == 0
    assert "parallel.pipeline" in job.output()


def test_preflight_ends_a_job_whose_nodes_cannot_talk(cluster: Cluster, rows: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "train.sbatch", training(rows), GLOO_SOCKET_IFNAME="ib7")
    assert job.finish(60) == "FAILED"
    for node in cluster.nodes:
        message = f"preflight: {node}: GLOO_SOCKET_IFNAME=ib7 is no interface; use one of eth0, lo"
        assert message in job.output()


def test_a_server_across_nodes_answers_at_its_url_and_shuts_down(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "serve.sbatch", ["model=tiny", "parallel.tensor=2", "port=8123"])
    wait(lambda: "URL http://" in job.output(), 120, job.output)
    url = job.output().partition("URL ")[2].split()[0]
    assert url.startswith("http://198.18.") and url.endswith(":8123/v1")
    wait(lambda: try_get(url.removesuffix("/v1") + "/health") is not None, 120, job.output)
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 5,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        assert json.load(response)["usage"]["completion_tokens"] == 5
    asked = time.monotonic()
    job.signal("TERM")
    assert job.finish(90) == "COMPLETED", job.output()
    assert time.monotonic() - asked < 60


def try_get(url: str) -> bytes | None:
    """The answer, or None while nobody answers with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.read()
    except OSError:
        return None
