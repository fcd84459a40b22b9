"""Sends a training run to the queue: `python -m slurm.submit nodes=2 time=4:00:00 model=smollm2 ...`.

`nodes`, `partition`, `time`, `account` and `dry_run` are the job's; every other key goes on to `train`. The
whole configuration is checked here, before the job waits in a queue. Without `nodes` the layout decides: as
few nodes as hold its ranks. `dry_run=true` prints the command and the script and needs no Slurm.
"""

import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from conf.check import check
from conf.load import load, training_arguments
from conf.schema import ConfigError, ParallelConf, SubmitConfig
from parallel.model.source import open_source

PROJECT = Path(__file__).parent.parent
SCRIPT = PROJECT / "slurm" / "train.sbatch"


def cluster_environment() -> dict[str, str]:
    """The environment of this process with the facts of `slurm/env.sh` added."""
    script = 'source "$1" && exec env --null'
    environment = {**os.environ, "ONEMESH_HOME": str(PROJECT)}
    command = ["bash", "-c", script, "bash", str(PROJECT / "slurm" / "env.sh")]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return dict(line.split("=", 1) for line in output.split("\0") if line)


def place(parallel: ParallelConf, nodes: int | None, most: int) -> tuple[int, int]:
    """The (nodes, ranks on each node) of a layout on nodes that hold `most` ranks.

    Every node runs the same number of ranks. With `parallel.data` unset, data parallelism fills the nodes.
    Raises ConfigError if the layout doesn't fit on `nodes`; None stands for the fewest nodes that it fits on.
    """
    axes = {"data": parallel.data, "pipeline": parallel.pipeline, "context": parallel.context}
    given = {name: size for name, size in {**axes, "tensor": parallel.tensor or 1}.items() if size is not None}
    product = math.prod(given.values())
    for count in [nodes] if nodes else range(1, product + 1):
        for ranks in range(most, 0, -1):
            total = count * ranks
            if total == product or (parallel.data is None and total % product == 0):
                return count, ranks
    assert nodes is not None, (parallel, most)
    layout = f"parallel.{' * '.join(f'{name}={size}' for name, size in given.items())} = {product} ranks"
    fewest, _ = place(parallel, None, most)
    raise ConfigError(f"nodes={nodes} of up to {most} ranks do not fit {layout}; use nodes={fewest}")


def command(config: SubmitConfig, nodes: int, ranks: int, arguments: Sequence[str]) -> list[str]:
    """The sbatch command line of the job; `ranks` run on each node, `arguments` go on to `train`."""
    options = [f"--nodes={nodes}", f"--time={config.time}"]
    options += [f"--partition={config.partition}"] if config.partition else []
    options += [f"--account={config.account}"] if config.account else []
    options.append(f"--export=ALL,ONEMESH_HOME={PROJECT},RANKS_PER_NODE={ranks}")
    return ["sbatch", *options, str(SCRIPT), *arguments]


def ranks_per_node(environment: Mapping[str, str]) -> int:
    """How many ranks a node holds, by env.sh: RANKS_PER_NODE, else the GPUs that jobs ask for, else one."""
    gpus = environment.get("SBATCH_GPUS_PER_NODE", "").rpartition(":")[2]
    return int(environment.get("RANKS_PER_NODE") or gpus or 1)


def main(argv: Sequence[str]) -> int:
    """Checks, then submits or prints; returns the exit code (2 for a user's mistake)."""
    try:
        config = load(argv, "submit")
        config = check(config, "submit", None, open_source(config.model).architecture)
        environment = cluster_environment()
        nodes, ranks = place(config.parallel, config.nodes, ranks_per_node(environment))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    line = command(config, nodes, ranks, training_arguments(argv))
    if config.dry_run:
        print(f"# {nodes} nodes, {nodes * ranks} ranks\n{shlex.join(line)}\n\n# {SCRIPT}")
        print(SCRIPT.read_text())
        return 0
    return subprocess.run(line, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
