"""Attention of context ranks over ragged packed documents is that of one process: output, lse and every gradient."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.documents import Documents
from parallel.comm import Launch
from parallel.context import gather, ring
from parallel.context.attention import ContextAttention
from parallel.context.plan import Cost, Plan, Route
from parallel.mesh import Mesh
from tests.ranks import on_ranks

HEADS = (0, 0, 0, 1, 1, 2, 2, 2, 2)
"""Nine query heads that share three KV heads unevenly, as on a tensor rank."""

PACKS = {
    "ragged": [37, 1, 5, 64, 1, 1, 23, 2],
    "one long document": [101],
    "shorter than a share": [1, 2, 1],
    "one token": [1],
    "none": [],
}


class Case(NamedTuple):
    """Attention of a pack on a number of ranks."""

    lengths: list[int]
    context: int
    method: str = "ring"
    ulysses: int = 1
    window: int | None = None
    dtype: torch.dtype = torch.float64
    capped: bool = False
    """Scores with a soft cap and slopes, which differ from head to head."""

    @property
    def options(self) -> dict[str, Any]:
        """The kernels'."""
        more = {"soft_cap": 1.5, "alibi_slopes": [0.02 * n for n in range(len(HEADS))]} if self.capped else {}
        return {"kv_index": HEADS, "window": self.window, "scale": 0.3, **more}


def inputs(case: Case) -> list[Tensor]:
    """q, k, v and the gradients of out and lse, of the whole pack."""
    total, generator = sum(case.lengths), torch.Generator().manual_seed(1)
    shapes = [(total, len(HEADS), 8), (total, 3, 8), (total, 3, 8), (total, len(HEADS), 8), (total, len(HEADS))]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def alone(case: Case) -> list[Tensor]:
    """out, lse and the gradients of q, k and v, by the reference in one process."""
    q, k, v, *grads = inputs(case)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    bounds = [0, *accumulate(case.lengths)]
    ops = dispatch.REFERENCE
    out, lse = ops.attention_varlen(*leaves, bounds, **case.options)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, grads, materialize_grads=True)]


def rank_of(launch: Launch, case: Case) -> Any:
    """One rank's tokens, and the same of them."""
    return rank_of_mesh(Mesh.build(launch, context=case.context, ulysses=case.ulysses), case)


def rank_of_mesh(mesh: Mesh, case: Case) -> Any:
    """`rank_of`, on a mesh."""
    ops = dispatch.select(torch.device("cpu"), case.dtype)
    bounds = [0, *accumulate(case.lengths)]
    plan = Plan.make(bounds, Cost(token=3), ring=mesh.ring.size, ulysses=mesh.ulysses.size)
    tokens = [t for piece in plan.share(mesh.ring.rank, mesh.ulysses.rank) for t in piece]
    q, k, v, *grads = (x[tokens] for x in inputs(case))
    leaves = [x.to(case.dtype).requires_grad_() for x in (q, k, v)]
    attend = ContextAttention(plan, case.method, mesh.ring, mesh.ulysses)  # pyright: ignore[reportArgumentType]
    out, lse = attend(ops, *leaves, **case.options)
    wide = [grads[0].to(out.dtype), grads[1].to(lse.dtype)]
    found = torch.autograd.grad((out, lse), leaves, wide, materialize_grads=True)
    return tokens, [x.detach().double().numpy() for x in (out, lse, *found)]


def together(case: Case, run: Any = rank_of) -> list[Tensor]:
    """The ranks' results, put in the pack's order."""
    whole = [torch.full_like(x, torch.nan) for x in alone(case)]
    parts = on_ranks(case.context, run, case) if case.context > 1 else [run(Launch(), case)]
    for tokens, found in parts:
        for full, part in zip(whole, found, strict=True):
            full[tokens] = torch.from_numpy(part)
    return whole


def errors(case: Case, run: Any = rank_of) -> list[float]:
    """Norm-wise, of out, lse and the gradients of q, k and v."""
    pairs = zip(together(case, run), alone(case), strict=True)
    return [float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)) for ours, theirs in pairs]


METHODS = {"ring": ("ring", 1), "all_gather": ("all_gather", 1), "ulysses": ("ulysses", 3)}


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("method", METHODS)
def test_attention_is_that_of_one_process(method: str, pack: str) -> None:
    name, ulysses = METHODS[method]
    assert max(errors(Case(PACKS[pack], 3, name, ulysses))) < 1e-13


RAGGED = PACKS["ragged"]


@pytest.mark.parametrize(
    "case",
    [
        Case(RAGGED, 2),
        Case(RAGGED, 2, "all_gather", window=7),
        Case([200], 3, window=30),
        Case([200], 3, "all_gather", window=100),
        Case(RAGGED, 4, window=1),
        Case(RAGGED, 2, "ulysses", 2, window=7),
        Case([60, 3, 70], 4, "ulysses", 2, window=40),
        Case([133], 4, "ulysses", 2),
        Case(RAGGED, 2, capped=True),
        Case(RAGGED, 2, "all_gather", window=20, capped=True),
        Case(RAGGED, 4, "ulysses", 2, capped=True),
    ],
    ids=lambda case: f"{case.method}{case.context} ulysses{case.ulysses} {case.window} {case.capped}",
)
def test_windows_caps_slopes_and_rings_of_groups(case: Case) -> None:
    assert max(errors(case)) < 1e-13


@pytest.mark.parametrize("case", [Case(RAGGED, 2), Case([150], 2, "all_gather"), Case([150], 3, "ulysses", 3)])
def test_low_precision_stays_as_close_as_one_process(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = case._replace(dtype=dtype)
        single = errors(case._replace(context=1, method="ring", ulysses=1))
        for ours, theirs in zip(errors(case), single, strict=True):
            assert ours <= 2 * theirs


def test_a_ring_gives_the_same_bits_every_time() -> None:
    case = Case([150, 40], 3, dtype=torch.bfloat16)
    for first, second in zip(together(case), together(case), strict=True):
        assert torch.equal(first, second)


def traffic_of(launch: Launch, case: Case) -> tuple[dict[str, int], dict[str, int]]:
    """Calls and bytes of a forward and backward pass, by operation."""
    mesh = Mesh.build(launch, context=case.context, ulysses=case.ulysses)
    rank_of_mesh(mesh, case)
    return {op: n for (op, _), n in mesh.traffic.calls.items()}, {op: n for (op, _), n in mesh.traffic.bytes.items()}


@pytest.mark.parametrize("method", ["ring", "all_gather"])
def test_nothing_travels_where_no_document_is_cut(method: str) -> None:
    assert on_ranks(2, traffic_of, Case([10, 10, 10, 10], 2, method)) == [({}, {})] * 2


def test_ring_sends_keys_only_as_far_as_someone_needs_them() -> None:
    """Three ranks, pieces 0 | 1 | 2 2 | 1 | 0: without a window every piece but the last goes to both others."""
    row = 2 * 3 * 8 * 8  # key and value of a token, three heads of eight float64
    case = Case([101], 3)
    plan = Plan.make([0, 101], Cost(token=3), ring=3)
    sizes = plan.route(0, None).sizes
    for rank, (calls, sent) in enumerate(on_ranks(3, traffic_of, case)):
        assert calls == {"send": 6}  # two steps forward; two steps of keys and of their gradients backward
        passed = [sizes[rank], sizes[(rank - 1) % 3]]
        gradients = [sizes[(rank - 1) % 3], sizes[(rank - 2) % 3]]
        assert sent["send"] == row * (2 * sum(passed) + sum(gradients))
    narrow = on_ranks(3, traffic_of, case._replace(window=2))
    # one key of rank 0 goes to its neighbour, two of the others' go to both; again backward, and their gradients
    assert sum(sent["send"] for _, sent in narrow) == row * 3 * (1 * 1 + 2 * 2 + 2 * 2)


def test_gathering_takes_one_collective_each_way() -> None:
    calls, _ = on_ranks(3, traffic_of, Case([101], 3, "all_gather"))[0]
    assert calls == {"all_gather": 1, "reduce_scatter": 1}


def without_keys(launch: Launch, case: Case) -> Any:
    """Rank 1 forgets what comes from rank 0."""
    route = Plan.route

    def planted(plan: Plan, rank: int, window: int | None) -> Route:
        right = route(plan, rank, window)
        return replace(right, parts=((), *right.parts[1:])) if rank == 1 else right

    Plan.route = planted
    return rank_of(launch, case)


def with_other_offsets(launch: Launch, case: Case) -> Any:
    """Queries stand one further than they do."""

    def planted(documents: Any) -> Any:
        def wrong(*arguments: Any) -> Documents:
            right = documents(*arguments)
            return replace(right, offsets=tuple(offset + 1 for offset in right.offsets))

        return wrong

    ring._one, gather._documents = planted(ring._one), planted(gather._documents)
    return rank_of(launch, case)


def without_a_border(launch: Launch, case: Case) -> Any:
    """Two documents are taken for one."""
    make = Plan.make

    def planted(bounds: list[int], *rest: Any, **options: Any) -> Plan:
        return make([*bounds[:1], *bounds[2:]], *rest, **options)

    Plan.make = planted
    return rank_of(launch, case)


def without_gradients_from_others(launch: Launch, case: Case) -> Any:
    """Keys that were sent get no gradient for it."""
    ring.add_tails = gather.add_tails = lambda *_: None  # pyright: ignore[reportPrivateImportUsage]
    return rank_of(launch, case)


@pytest.mark.parametrize("planted", [without_keys, with_other_offsets, without_a_border, without_gradients_from_others])
@pytest.mark.parametrize("method", ["ring", "all_gather"])
def test_planted_bugs_are_seen(method: str, planted: Any) -> None:
    window = 30 if planted is with_other_offsets else None
    assert max(errors(Case([30, 50, 90], 2, method, window=window), planted)) > 1e-3


def groups_of(launch: Launch) -> list[tuple[int, ...]]:
    """Ranks that swap heads with this one, and those of its ring."""
    mesh = Mesh.build(launch, context=4, tensor=2, ulysses=2)
    return [mesh.tensor.ranks, mesh.ulysses.ranks, mesh.ring.ranks, mesh.context.ranks]


def test_groups_of_rings_of_groups() -> None:
    found = on_ranks(8, groups_of)
    assert found[0] == [(0, 1), (0, 2), (0, 4), (0, 2, 4, 6)]
    assert found[3] == [(2, 3), (1, 3), (3, 7), (1, 3, 5, 7)]
    assert found[6] == [(6, 7), (4, 6), (2, 6), (0, 2, 4, 6)]
