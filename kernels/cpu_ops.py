"""The C++ backend: ops of `kernels.reference` for float32 and bfloat16 on CPUs, compiled once per instruction set.

`kernels/cpu/` has the sources; `kernels.cpu_attention`, `cpu_linear`, `cpu_loss` and `cpu_rows` have the functions.
Where the library was not built (no compiler at installation), `load` returns None and torch does all the work.
"""

from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_cpu.so")


def load() -> str | None:
    """Loads the library; returns the instruction set it chose (ONEMESH_CPU_ISA forces one), None if it isn't built.

    Raises:
        RuntimeError: it is built, but doesn't load: for another torch or processor.
        ValueError: ONEMESH_CPU_ISA names no instruction set of this processor.
    """
    if not LIBRARY.is_file():
        return None
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise RuntimeError(f"{LIBRARY} doesn't load ({error}); build it again: make clean install") from None
    try:
        return torch.ops.onemesh.isa()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{reason}; use one of them, or unset it for the best one") from None
