"""A throwaway Slurm on this machine, for tests: a controller, and nodes that share only the file system.

    host     munged, slurmctld       198.18.S.254 on the bridge onemeshS
    node1    slurmd, its jobs        198.18.S.1 in a network namespace of its own
    node2    slurmd, its jobs        198.18.S.2 in a network namespace of its own

Each node also has a host name and a pid namespace: `localhost` means something else on every node, as on a
real cluster, and killing a node's first process ends all that its jobs left behind. Needs root and Debian's
packages slurmctld, slurmd, slurm-client, munge and iproute2; no systemd and no cgroups.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter")

CONFIG = """\
ClusterName=onemesh
SlurmctldHost=localhost({subnet}.254)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
# A requeued job may start again cred_expire seconds later.
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PropagateResourceLimits=NONE
SchedulerParameters=sched_interval=1
ReturnToService=2
KillWait=5
MinJobAge=3600
# The nodes claim more processors than the machine has.
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=4 RealMemory=16000
"""


def missing_programs() -> list[str]:
    """The programs that the cluster needs and this machine lacks."""
    return [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]


def install() -> None:
    """Installs the Debian packages with apt-get; raises CalledProcessError when that fails."""
    subprocess.run(["apt-get", "-q", "update"], check=True, capture_output=True)
    command = ["apt-get", "-qy", "install", "--no-install-recommends", *PACKAGES]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(command, check=True, capture_output=True, env=environment)


class Cluster:
    """A running cluster of `nodes` nodes; `root` holds all of its files and has a short path."""

    def __init__(self, root: Path, nodes: int = 2) -> None:
        # A step's socket, root/spool/nodeN/nodeN_JOB.STEP, must stay below 108 bytes.
        assert len(str(root)) <= 60, f"{root} is longer than 60 characters"
        self.root = root
        self.nodes = tuple(f"node{n}" for n in range(1, nodes + 1))
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(root / "slurm.conf")}
        self._running: list[subprocess.Popen[bytes]] = []
        self._namespaces: list[str] = []
        self._links: list[str] = []
        self._bridge = ""

    def start(self) -> None:
        """Starts everything, waits until all nodes are idle; raises TimeoutError with the logs otherwise."""
        (self.root / "state").mkdir(parents=True)
        (self.root / "munge.key").write_bytes(secrets.token_bytes(1024))
        (self.root / "munge.key").chmod(0o600)
        self._write_config(self._add_bridge())
        files = ("key", "socket", "pid", "log", "seed")
        names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        options = [f"--{name}={self.root}/munge.{file}" for name, file in zip(names, files, strict=True)]
        self._spawn(["munged", "--foreground", "--force", *options])
        wait(lambda: (self.root / "munge.socket").exists(), 10, self.logs)
        self._spawn(["slurmctld", "-D"])
        for number, node in enumerate(self.nodes, start=1):
            self._boot(number, node)
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        wait(lambda: self.run(idle, check=False).strip() == str(len(self.nodes)), 30, self.logs)

    def stop(self) -> None:
        """Ends every process of the cluster and of its jobs, and takes its network away."""
        for process in reversed(self._running):
            # The children are a node's first processes: their namespaces die with them.
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            for pid in children.read_text().split() if children.exists() else []:
                os.kill(int(pid), signal.SIGKILL)
            process.kill()
            process.wait()
        for namespace in self._namespaces:
            _ip("netns", "delete", namespace)
        # The links into a namespace go with it, but some time after its name; the next cluster needs their names.
        for link in self._links:
            subprocess.run(["ip", "link", "delete", link], check=False, capture_output=True)

    def run(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> str:
        """What a Slurm command prints, run on the controller's host; with `check` it must succeed."""
        environment = {**self.environment, **(env or {})}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: int) -> str:
        """The job's state, e.g. PENDING, RUNNING, COMPLETED."""
        return self._field(job, "JobState")

    def restarts(self, job: int) -> int:
        """How often the job has been requeued."""
        return int(self._field(job, "Restarts"))

    def logs(self) -> str:
        """The daemons' logs, their last lines, for the message of a failure."""
        files = sorted(self.root.glob("*.log"))
        return "\n".join(f"== {file.name}\n{file.read_text()[-2000:]}" for file in files)

    def in_node(self, node: str, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` in the node's network."""
        return ["nsenter", f"--net=/run/netns/{self._bridge}-{node}", *command]

    def _field(self, job: int, name: str) -> str:
        words = self.run(["scontrol", "--oneliner", "show", "job", str(job)]).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def _add_bridge(self) -> str:
        """Makes the bridge that joins the nodes; returns the first three numbers of its subnet."""
        for number in range(256):
            bridge = f"onemesh{number}"
            command = ["ip", "link", "add", bridge, "up", "type", "bridge"]
            if subprocess.run(command, check=False, capture_output=True).returncode == 0:
                self._bridge = bridge
                self._links.append(bridge)
                subnet = f"198.18.{number}"
                _ip("address", "add", f"{subnet}.254/24", "dev", bridge)
                return subnet
        raise OSError("no network bridge could be made; it takes root and the CAP_NET_ADMIN capability")

    def _write_config(self, subnet: str) -> None:
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        text = CONFIG.format(subnet=subnet, port=port, root=self.root)
        hosts = Path("/etc/hosts").read_text()
        for index, node in enumerate(self.nodes, start=1):
            text += f"NodeName={node} NodeAddr={subnet}.{index}\n"
            hosts += f"{subnet}.{index} {node}\n"
        text += "PartitionName=main Nodes=ALL Default=YES\n"
        (self.root / "slurm.conf").write_text(text)
        (self.root / "hosts").write_text(hosts)

    def _boot(self, number: int, node: str) -> None:
        namespace = f"{self._bridge}-{node}"
        subnet = f"198.18.{self._bridge.removeprefix('onemesh')}"
        _ip("netns", "add", namespace)
        self._namespaces.append(namespace)
        link = f"{self._bridge}n{number}"
        peer = ["peer", "name", "eth0", "netns", namespace]
        _ip("link", "add", link, "master", self._bridge, "up", "type", "veth", *peer)
        self._links.append(link)
        _ip("-n", namespace, "address", "add", f"{subnet}.{number}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        _ip("-n", namespace, "link", "set", "lo", "up")
        (self.root / "spool" / node).mkdir(parents=True)
        unshare = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = 'hostname "$1" && mount --bind "$2" /etc/hosts && slurmd -D -N "$1"; exit'
        shell = ["bash", "-c", script, "bash", node, str(self.root / "hosts")]
        self._spawn(self.in_node(node, [*unshare, *shell]))

    def _spawn(self, command: Sequence[str]) -> None:
        name = f"{len(self._running)}-{command[0]}.log"
        with (self.root / name).open("wb") as log:
            process = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running.append(process)


def wait(done: Callable[[], bool], seconds: float, explain: Callable[[], str]) -> None:
    """Polls until `done()`; raises TimeoutError with `explain()` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not done after {seconds:g} s\n{explain()}")
        time.sleep(0.1)


def _path() -> str:
    """The search path, with the folders of the system's daemons."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
