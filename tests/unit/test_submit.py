"""Slurm without Slurm: where a job's ranks go, the command it is sent with, what preflight finds, exit code 75."""

import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from conf.schema import ConfigError, ParallelConf
from slurm import preflight, worker
from slurm.preflight import Facts, Unreachable, compare, gather, local_problems, own_address, report
from slurm.submit import main, place

FACTS = Facts(node="node1", python="3.11.7", torch="2.13.0", code="abc", folder="/runs inode 7", ranks="2")


@pytest.mark.parametrize(
    ("parallel", "nodes", "most", "expected"),
    [
        (ParallelConf(), None, 1, (1, 1)),
        (ParallelConf(), 3, 8, (3, 8)),
        (ParallelConf(tensor=2), None, 1, (2, 1)),
        (ParallelConf(tensor=2), None, 8, (1, 8)),
        (ParallelConf(tensor=3), None, 8, (1, 6)),
        (ParallelConf(tensor=2, data=1), None, 8, (1, 2)),
        (ParallelConf(tensor=4, pipeline=4, data=2), None, 8, (4, 8)),
        (ParallelConf(tensor=4, pipeline=4), 4, 8, (4, 8)),
        (ParallelConf(tensor=3, data=3), None, 4, (3, 3)),
        (ParallelConf(tensor=4, data=2), 4, 8, (4, 2)),
    ],
)
def test_place(parallel: ParallelConf, nodes: int | None, most: int, expected: tuple[int, int]) -> None:
    assert place(parallel, nodes, most) == expected


@pytest.mark.parametrize(
    ("parallel", "nodes", "most", "message"),
    [
        (
            ParallelConf(tensor=2),
            1,
            1,
            "nodes=1 of up to 1 ranks do not fit parallel.pipeline=1 * context=1 * tensor=2 = 2 ranks; use nodes=2",
        ),
        (
            ParallelConf(tensor=2, data=4),
            3,
            4,
            "nodes=3 of up to 4 ranks do not fit parallel.data=4 * pipeline=1 * context=1 * tensor=2 = 8 ranks; "
            "use nodes=2",
        ),
    ],
)
def test_place_refuses(parallel: ParallelConf, nodes: int, most: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        place(parallel, nodes, most)
    assert str(error.value) == message


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "my rows.jsonl"
    path.write_text('{"text": "a"}\n')
    return path


def test_dry_run_prints_the_command_and_the_script(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["nodes=2", "partition=gpu", "time=4:00:00", "account=me", "dry_run=true"]
    training = ["model=tiny", "parallel.tensor=2", f"data.path={rows}"]
    assert main([*training, *job]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# 2 nodes, 2 ranks"
    project = Path(__file__).parent.parent.parent
    assert lines[1] == (
        "sbatch --nodes=2 --time=4:00:00 --partition=gpu --account=me "
        f"--export=ALL,ONEMESH_HOME={project},RANKS_PER_NODE=1 {project}/slurm/train.sbatch "
        f"model=tiny parallel.tensor=2 'data.path={rows}'"
    )
    assert "#!/bin/bash" in lines and "#SBATCH --requeue" in lines


def test_a_node_holds_the_gpus_that_jobs_ask_for(
    rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_GPUS_PER_NODE", "a100:8")
    assert main(["model=tiny", f"data.path={rows}", "parallel.tensor=4", "parallel.data=4", "dry_run=true"]) == 0
    assert "# 2 nodes, 16 ranks\nsbatch --nodes=2 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optim.lrr=1", "optim.lr"),
        ("train.steps=-1", "train.steps=-1"),
        ("parallel.tensor=2", "nodes=1 of up to 1 ranks do not fit"),
    ],
)
def test_a_mistake_is_found_before_the_queue(
    argument: str, message: str, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model=tiny", f"data.path={rows}", "nodes=1", argument]) == 2
    assert message in capsys.readouterr().err


def test_compare_names_what_differs_and_what_to_do() -> None:
    other = replace(FACTS, node="node2", torch="2.12.0", problems=("no disk",))
    advice = "use the same virtual environment on every node (ONEMESH_VENV)"
    assert compare([FACTS, replace(FACTS, node="node2")]) == []
    assert compare([FACTS, other]) == [
        "node2: no disk",
        f"node2: torch=2.12.0 differs from node1's 2.13.0; {advice}",
    ]


@pytest.mark.parametrize("code", ["abc", "other"])
def test_nodes_tell_the_head_and_hear_the_verdict(code: str) -> None:
    others = [replace(FACTS, node="node2"), replace(FACTS, node="node3", code=code)]
    port = free_port()
    with ThreadPoolExecutor() as pool:
        verdicts = [pool.submit(report, facts, "127.0.0.1", port, 10) for facts in others]
        problems = gather(FACTS, port, 3, 10)
        assert [verdict.result() for verdict in verdicts] == [code == "abc"] * 2
    expected = "node3: code=other differs from node1's abc; use a checkout on a shared file system (ONEMESH_HOME)"
    assert problems == ([] if code == "abc" else [expected])


def test_a_node_that_does_not_get_through_is_reported_on_both_sides() -> None:
    port = free_port()
    assert gather(FACTS, port, 2, 0.2) == [f"only 1 of 2 nodes got through to node1, port {port}"]
    with pytest.raises(Unreachable, match=rf"node2 cannot reach the head node at 127\.0\.0\.1:{port} .*firewall"):
        report(replace(FACTS, node="node2"), "127.0.0.1", port, 0.2)


def test_a_name_that_stands_for_loopback_needs_an_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    (problem,) = local_problems({"SLURM_NNODES": "2"}, "10.0.0.7")
    assert problem.startswith("this node is 10.0.0.7 to other nodes, but its own name stands for 127.0.0.1; set GLOO_")
    assert local_problems({"SLURM_NNODES": "2", "GLOO_SOCKET_IFNAME": "lo"}, "10.0.0.7") == []
    assert local_problems({"SLURM_NNODES": "1"}, "10.0.0.7") == []
    assert local_problems({"SLURM_NNODES": "2"}, "127.0.0.1") == []
    (problem,) = local_problems({"SLURM_NNODES": "2", "GLOO_SOCKET_IFNAME": "ib7"}, "10.0.0.7")
    assert problem.startswith("GLOO_SOCKET_IFNAME=ib7 is no interface; use one of ")


def test_nodes_of_one_machine_have_the_addresses_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_address_of", lambda host: "127.0.1.2")
    assert own_address("127.0.1.1") == "127.0.1.2"


def test_preflight_looks_at_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    facts = preflight.look({"SLURMD_NODENAME": "node1", "RANKS_PER_NODE": "2", "SLURM_NNODES": "1"}, "127.0.0.1")
    assert facts.node == "node1" and facts.ranks == "2" and facts.problems == ()
    assert facts.folder == f"{tmp_path} inode {tmp_path.stat().st_ino}"
    assert facts.torch.startswith("2.")


@pytest.fixture
def usr1() -> Iterator[None]:
    """The worker changes what USR1 does; afterwards it does what it did."""
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("usr1")
@pytest.mark.parametrize(("code", "node", "left"), [(75, "0", True), (75, "1", False), (0, "0", False)])
def test_worker_turns_75_into_a_file_on_the_head_node(
    code: int, node: str, left: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"import sys\nassert sys.argv[1:] == ['a=b c']\nsys.exit({code})\n"
    (tmp_path / "stands_in.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("SLURM_NODEID", node)
    monkeypatch.setenv("ONEMESH_STOPPED", str(tmp_path / "stopped"))
    if code == 75:
        worker.main("stands_in", ["a=b c"])
    else:
        with pytest.raises(SystemExit):
            worker.main("stands_in", ["a=b c"])
    assert (tmp_path / "stopped").exists() == left
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


@pytest.mark.usefixtures("usr1")
def test_worker_lets_failures_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails.py").write_text("import sys\nsys.exit(2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as end:
        worker.main("fails", [])
    assert end.value.code == 2


def test_worker_names_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEMESH_ADDRESS", "10.0.0.7")
    assert worker.url(["model=tiny", "port=9000"]).startswith("URL http://10.0.0.7:9000/v1 ")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
