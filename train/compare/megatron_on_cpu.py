"""Lets megatron-core run on CPUs over gloo: what it asks of torch.cuda is answered for the CPU.

Import it before anything of megatron. Nothing of megatron itself is replaced but the two functions that reach for
CUDA's random state.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

CPU = torch.device("cpu")
FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")


class Stream:
    """A stream in which everything is done at once."""

    def wait_stream(self, other: Stream) -> None:
        """Nothing is under way."""

    wait_event = wait_stream

    def synchronize(self) -> None:
        """Nothing is under way."""


def on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make` with device="cuda" (or a number) meaning the CPU."""

    @functools.wraps(make)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        device = options.get("device")
        if isinstance(device, int) or str(device).startswith("cuda"):
            options["device"] = CPU
        return make(*arguments, **options)

    return wrapped


def install() -> None:
    """Changes torch in this process."""
    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    real_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """Its optimizers look for `torch.cuda.FloatTensor`."""
        answer = real_type(self, *arguments, **options)
        return answer if arguments or options else answer.replace("torch.", "torch.cuda.")

    torch.Tensor.type = cuda_type  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.cuda = lambda self, *_, **__: self
    answers: dict[str, Callable[..., Any]] = {
        "current_device": lambda: CPU,
        "Stream": lambda *_, **__: Stream(),
        "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(),
        "stream": lambda _: nullcontext(),
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "synchronize": lambda *_: None,  # a function of its own for each name, or torch.compile's tables refuse them
        "empty_cache": lambda: None,
        "set_device": lambda _: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.nvtx.range_push = lambda _: None
    torch.cuda.nvtx.range_pop = lambda: None

    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
