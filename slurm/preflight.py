"""Checks the nodes of a job in a second, before torch is imported.

Each node runs `python -m slurm.preflight HEAD PORT`: it looks at itself, connects to the head node on the
port that the rendezvous will use, and tells it what it runs and sees. The head node compares and prints all
problems at once, and every node ends with 2 if there are any. Standard output is the node's own address.
"""

import hashlib
import ipaddress
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).parent.parent
PACKAGES = ("conf", "kernels", "parallel", "serve", "train", "slurm")
TIMEOUT_S = 60.0

ADVICE: Mapping[str, str] = {
    "python": "use the same virtual environment on every node (ONEMESH_VENV)",
    "torch": "use the same virtual environment on every node (ONEMESH_VENV)",
    "code": "use a checkout on a shared file system (ONEMESH_HOME)",
    "folder": "submit from a folder on a shared file system: runs write there",
    "ranks": "start the same number of ranks on every node (RANKS_PER_NODE)",
}
"""What to do when a fact differs between nodes."""


class Unreachable(Exception):
    """A node that another one does not get through to; the text names both and the address."""


@dataclass(frozen=True)
class Facts:
    """What a node knows of itself; all between `node` and `problems` must be the same on every node."""

    node: str
    python: str
    torch: str
    code: str
    folder: str
    ranks: str
    problems: tuple[str, ...] = ()


def look(environment: Mapping[str, str], address: str) -> Facts:
    """The facts of this node, from `environment` (Slurm's variables and those of env.sh) and the machine.

    `address` is the node's own one, by which the others reach it.
    """
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((PROJECT / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return Facts(
        node=environment["SLURMD_NODENAME"],
        python=platform.python_version(),
        torch=_torch_version(),
        code=digest.hexdigest()[:12],
        # Nodes that see one shared folder see one inode.
        folder=f"{Path.cwd()} inode {Path.cwd().stat().st_ino}",
        ranks=environment["RANKS_PER_NODE"],
        problems=tuple(local_problems(environment, address)),
    )


def local_problems(environment: Mapping[str, str], address: str) -> list[str]:
    """What is wrong with this node alone, one line each."""
    problems: list[str] = []
    if not _torch_version():
        problems.append(f"no torch in {sys.prefix}; set ONEMESH_VENV in slurm/env.sh")
    if not os.access(Path.cwd(), os.W_OK):
        problems.append(f"{Path.cwd()} is not writable; submit from a folder that is")
    present = {name for _, name in socket.if_nameindex()}
    interface = environment.get("GLOO_SOCKET_IFNAME")
    if interface and interface not in present:
        names = ", ".join(sorted(present))
        problems.append(f"GLOO_SOCKET_IFNAME={interface} is no interface; use one of {names} in slurm/env.sh")
    if int(environment["SLURM_NNODES"]) > 1 and not interface and not _is_loopback(address):
        named = _address_of(socket.gethostname())
        if named is None or _is_loopback(named):
            problems.append(
                f"this node is {address} to other nodes, but its own name stands for {named or 'no address'}; "
                "set GLOO_SOCKET_IFNAME in slurm/env.sh"
            )
    return problems


def own_address(head: str) -> str:
    """The address of this node on the network that it reaches the head node through.

    Where all nodes are one machine that is a loopback address, and may be the same one for all of them; then it is
    the address that the node's name stands for.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, 1))  # sends nothing, only finds the route
        address = str(probe.getsockname()[0])
    return (_address_of(socket.gethostname()) or address) if _is_loopback(address) else address


def compare(nodes: Sequence[Facts]) -> list[str]:
    """All that is wrong, a line each: the nodes' own problems, then what differs from the first node."""
    problems = [f"{facts.node}: {problem}" for facts in nodes for problem in facts.problems]
    for name, advice in ADVICE.items():
        wanted = getattr(nodes[0], name)
        for facts in nodes[1:]:
            found = getattr(facts, name)
            if found != wanted:
                problems.append(f"{facts.node}: {name}={found} differs from {nodes[0].node}'s {wanted}; {advice}")
    return problems


def gather(facts: Facts, port: int, nodes: int, timeout_s: float = TIMEOUT_S) -> list[str]:
    """On the head node: listens until all other nodes have sent their facts, tells them whether all is well.

    Returns the problems; nodes that do not call within `timeout_s` are one of them.
    """
    deadline = time.monotonic() + timeout_s
    gathered = [facts]
    calls: list[socket.socket] = []
    with socket.create_server(("", port), backlog=nodes) as server:
        while len(gathered) < nodes:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                call, _ = server.accept()
            except TimeoutError:
                break
            call.settimeout(timeout_s)
            gathered.append(_facts(call.makefile().readline()))
            calls.append(call)
        problems = compare(gathered)
        if len(gathered) < nodes:
            problems.append(f"only {len(gathered)} of {nodes} nodes got through to {facts.node}, port {port}")
        for call in calls:
            with call:
                call.sendall(b"stop\n" if problems else b"go\n")
    return problems


def report(facts: Facts, head: str, port: int, timeout_s: float = TIMEOUT_S) -> bool:
    """On the other nodes: sends the facts to the head node; returns whether all is well there.

    Raises Unreachable when the head node cannot be reached within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            call = socket.create_connection((head, port), timeout=timeout_s)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise Unreachable(
                    f"{facts.node} cannot reach the head node at {head}:{port} ({error}); "
                    "is a firewall between the nodes?"
                ) from error
            time.sleep(0.1)
    with call:
        call.sendall(json.dumps(asdict(facts)).encode() + b"\n")
        return call.makefile().readline() == "go\n"


def main(head: str, port: int) -> int:
    """Runs this node's part of the check; prints the node's address; returns 0 if every node is fit, else 2."""
    address = own_address(head)
    facts = look(os.environ, address)
    problems: list[str] = []
    if os.environ["SLURM_NODEID"] == "0":
        problems = gather(facts, port, int(os.environ["SLURM_NNODES"]))
        fit = not problems
    else:
        try:
            fit = report(facts, head, port)
        except Unreachable as error:
            problems, fit = [str(error)], False
    for problem in problems:
        print(f"preflight: {problem}", file=sys.stderr)
    print(address)
    return 0 if fit else 2


def _facts(line: str) -> Facts:
    values = json.loads(line)
    return Facts(**{**values, "problems": tuple(values["problems"])})


def _torch_version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _address_of(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
