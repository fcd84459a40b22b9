"""How many bytes a layer keeps for its backward pass: counted, and by the formula of `parallel.recompute`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from parallel.comm import Launch
from parallel.mesh import Mesh
from parallel.sequence import Split
from parallel.sharding import cut
from tests.models import RandomWeights
from tests.training import Run, rows_of
from train.batches import Microbatch, pack
from train.model import build_model

needs_cpu_kernels = pytest.mark.skipif(
    not dispatch.select(torch.device("cpu"), torch.float32).name.startswith("cpu "),
    reason="the formula is that of the C++ kernels, which aren't built or don't run here",
)


def a_layer_keeps(launch: Launch, run: Run) -> int:
    """Bytes that one more layer keeps on this rank; collective."""
    mesh = Mesh.build(launch, tensor=run.tensor)
    return _kept_by(mesh, run, 3) - _kept_by(mesh, run, 2)


def formula(launch: Launch, run: Run) -> int:
    """The same by the table of `parallel.recompute`, in float32."""
    a, tokens = run.architecture, _batch(run).num_tokens
    here = cut(a, run.tensor, launch.rank)
    mesh = Mesh.build(launch, tensor=run.tensor)
    share = Split.of(tokens, mesh.tensor).size if run.sequence else tokens
    columns = here.ffn[1] - here.ffn[0]
    heads = (2 * here.num_heads + 2 * here.num_kv_heads) * a.head_dim + here.num_heads
    norms, gates = {"none": (4, 3), "selective": (2, 2)}[run.recompute]
    return 4 * (share * norms * a.width + tokens * (heads + gates * columns))


def _batch(run: Run) -> Microbatch:
    return pack(rows_of(1, run.batch_size, run.architecture.vocab_size))


def _kept_by(mesh: Mesh, run: Run, layers: int) -> int:
    run = replace(run, architecture=replace(run.architecture, num_layers=layers))
    ops = dispatch.select(torch.device("cpu"), torch.float32)
    model = build_model(run.config, RandomWeights(run.architecture), mesh, ops)
    with _counted() as found:
        total = model.loss(_batch(run), 0, None, None, None)
    assert total.requires_grad
    weights = {parameter.untyped_storage().data_ptr() for _, parameter in model.trainable()}
    return sum(size for address, size in found.items() if address not in weights)


@contextmanager
def _counted() -> Iterator[dict[int, int]]:
    """Address and bytes of the memory of all that autograd saves inside, or that is needed to make it again."""
    found: dict[int, int] = {}
    alive: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def counting(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Any:
        def count(x: Tensor) -> Any:
            packed = pack(x)
            for part in [packed] if isinstance(packed, Tensor) else _held(packed.again.make):
                alive.append(part.detach())
                found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
            return packed

        return hooks(count, unpack)

    torch.autograd.graph.saved_tensors_hooks = counting
    try:
        with counting(Tensor.detach, lambda x: x):
            yield found
    finally:
        torch.autograd.graph.saved_tensors_hooks = hooks


def _held(thing: Any) -> list[Tensor]:
    """The tensors of a closure, a partial or a bound method."""
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, functools.partial):
        parts = [thing.func, *thing.args]
    else:
        parts = [
            getattr(thing, "__self__", None),
            *(c.cell_contents for c in getattr(thing, "__closure__", None) or ()),
        ]
    held = [part for part in parts if callable(part) or isinstance(part, Tensor)]
    return [x for part in held if not isinstance(part, torch.nn.Module) for x in _held(part)]
