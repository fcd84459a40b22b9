"""`python -m parallel.checkpoint inspect|verify <directory>`: what is in a checkpoint, and whether it is undamaged.

Exit codes: 0 done and, for verify, every tensor as it was saved; 1 something is damaged, truncated or missing, or there
are no checksums to tell; 2 a wrong argument.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from conf.schema import ConfigError
from parallel.checkpoint import checksum
from parallel.checkpoint.contents import describe
from parallel.checkpoint.verify import verify

USAGE = "usage: python -m parallel.checkpoint inspect|verify <directory>"


def main(arguments: Sequence[str]) -> int:
    """Prints what was asked for; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    if len(arguments) != 2 or arguments[0] not in ("inspect", "verify"):
        return _wrong(USAGE)
    directory = Path(arguments[1])
    if not directory.is_dir():
        return _wrong(f"{directory} is not a directory; give a checkpoint, as <run_dir>/checkpoints/latest")
    if arguments[0] == "verify":
        return _verify(directory)
    try:
        print(describe(directory))
    except ConfigError as error:
        return _wrong(str(error))
    return 0


def _verify(directory: Path) -> int:
    verdict = verify(directory)
    counts = f"{verdict.tensors} tensors in {verdict.files} files"
    if verdict.problems:
        print("\n".join([f"{directory}:", *(f"  {line}" for line in verdict.problems)]), file=sys.stderr)
        return 1
    if not verdict.files:
        return _wrong(f"{directory} holds no .safetensors file; give a checkpoint, as <run_dir>/checkpoints/latest")
    if not verdict.has_checksums:
        print(
            f"{directory} has no {checksum.FILE} (an older version or another program wrote it): the sizes of {counts} "
            "are right, their values can't be checked",
            file=sys.stderr,
        )
        return 1
    print(f"{directory}: {counts} are as they were saved")
    return 0


def _wrong(text: str) -> int:
    print(text, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
