"""The kernels' backend as a user asks for it."""

from __future__ import annotations

from conf.schema import ConfigError
from kernels import cpu_ops


def check_instruction_set() -> None:
    """Raises ConfigError when ONEMESH_CPU_ISA names no instruction set of this processor; call it before ranks meet.

    Where the C++ kernels aren't built the variable has no effect.
    """
    try:
        cpu_ops.load()
    except ValueError as error:
        raise ConfigError(str(error)) from None
