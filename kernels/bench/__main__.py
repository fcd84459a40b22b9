"""`python -m kernels.bench attention`: measures on this machine, writes docs/benchmarks/attention.md.

    python -m kernels.bench attention                        # every instruction set that this processor has
    python -m kernels.bench attention --isa avx2 --tables training --threads 1 --dtypes bfloat16

With `--isa` the tables of that one instruction set go to standard output alone.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from kernels import cpu_ops
from kernels.bench import attention, linear, rows, sampler, timing
from kernels.machine import processor

FAMILIES = {"attention": attention.TABLES, "linear": linear.TABLES}
"""Measured on every instruction set."""
WHOLE = {"rows": rows.run, "sampler": sampler.run}
"""Measured once, on the best one."""
SETS = ("avx512bf16", "avx512", "avx2", "sse42", "generic")
ROOT = Path(__file__).parents[2]


def main() -> int:
    """Exit code 0, or 2 for arguments that don't fit."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description="Measures kernels beside torch's.")
    parser.add_argument("family", choices=[*FAMILIES, *WHOLE])
    parser.add_argument("--isa", choices=SETS, help="one instruction set, to standard output")
    parser.add_argument("--tables", nargs="+", help="of the family; all where it isn't given")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    arguments = parser.parse_args()
    if arguments.family in WHOLE:
        return _write(arguments.family, [_head(sys.argv[1:]), WHOLE[arguments.family]()])
    family = FAMILIES[arguments.family]
    tables = arguments.tables or list(family)
    if unknown := set(tables) - set(family):
        parser.error(f"--tables: {arguments.family} has {', '.join(family)}, not {', '.join(sorted(unknown))}")
    if arguments.isa is None:
        return _report(arguments.family, sys.argv[1:])
    os.environ["ONEMESH_CPU_ISA"] = arguments.isa
    if cpu_ops.load() is None:
        parser.error(f"{cpu_ops.LIBRARY.name} isn't built: there was no C++ compiler at `make install`")
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    chosen = {name: family[name] for name in tables}
    print(f"## {arguments.isa}\n\n{timing.measure(chosen, dtypes, arguments.threads)}\n")
    return 0


def _report(family: str, options: list[str]) -> int:
    """One process for every instruction set; those that this processor lacks are left out."""
    parts = [_head(options)]
    for isa in SETS:
        command = [sys.executable, "-m", "kernels.bench", *options, "--isa", isa]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode and "is not one of" not in done.stderr:
            sys.stderr.write(done.stderr)
            return done.returncode
        parts += [done.stdout] if not done.returncode else []
    return _write(family, parts)


def _head(options: list[str]) -> str:
    machine = f"{processor()}, {os.cpu_count()} processors, torch {torch.__version__}"
    return (
        f"# {options[0]}: measured\n\n`python -m kernels.bench {' '.join(options)}` on {machine}. Medians of "
        "interleaved runs; compare figures of one table alone.\n"
    )


def _write(family: str, parts: list[str]) -> int:
    report = ROOT / "docs" / "benchmarks" / f"{family}.md"
    report.write_text("\n".join(parts).rstrip() + "\n")
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
