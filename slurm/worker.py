"""One rank of a Slurm job: runs `train` or `serve` and tells the batch script what torchrun would swallow.

Torchrun makes an exit code of 1 out of every other one, and takes a rank that ends with 75 (stopped on
request, saved) for a failure. So here 75 becomes 0 and a file on the head node, where the batch script looks.
"""

import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from conf.check import check
from conf.load import load
from conf.schema import ConfigError

STOPPED = 75
"""The exit code of a run that was asked to stop, has saved and can go on."""


def main(module: str, arguments: Sequence[str]) -> None:
    """Runs `python -m module arguments` in this process; ends as it ends, except for exit code 75."""
    if module == "serve":
        arguments = [f"host={os.environ['ONEMESH_ADDRESS']}", *arguments]
        if os.environ["RANK"] == "0":
            print(url(arguments), flush=True)
    if module == "train" and has_begun(arguments, os.environ):
        arguments = [*arguments, "train.resume=auto"]
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code != STOPPED:
            raise
        leave_word(os.environ)
    finally:
        # The batch script repeats its request. Python's shutdown would restore the signal's deadly default.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def has_begun(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether this is a requeued job whose run has saved: then train.resume=never or a path was for its first start."""
    if environment.get("SLURM_RESTART_COUNT", "0") == "0":
        return False
    try:
        config = check(load(arguments, "train"), "train", None, None)
    except ConfigError:
        return False
    return (Path(config.run_dir) / "checkpoints" / "latest").exists()


def leave_word(environment: Mapping[str, str]) -> None:
    """Makes the file that tells the batch script to requeue the job, if this is the batch script's node."""
    if environment["SLURM_NODEID"] == "0":
        Path(environment["ONEMESH_STOPPED"]).touch()


def url(arguments: Sequence[str]) -> str:
    """The line that says where the server will answer; a wrong argument is left for `serve` to report."""
    try:
        port = load(arguments, "serve").port
    except ConfigError:
        return "the server's arguments are wrong"
    return f"URL http://{os.environ['ONEMESH_ADDRESS']}:{port}/v1 (answers once the model is loaded)"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
