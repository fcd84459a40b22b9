"""The gradients of attention over packed documents, on the host executor, against the reference's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.cuda_layout import heads_of, packed_work
from kernels.documents import Documents
from kernels.reference import check_kv_index, working_dtype
from tests.cuda_host import DTYPES, FORWARD, ORDERS, assert_as_plain, call, draw, plant, seeded

SOURCE = "attention_varlen_grad.cu"
GRADS = ("grad_q", "grad_k", "grad_v")
Orders = Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Packed documents of these lengths, or a `ring` whose queries and keys differ in number."""

    documents: Sequence[int] = ()
    ring: Documents | None = None
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    kv_index: tuple[int, ...] | None = None
    window: int | None = None
    softcap: float = 0.0
    slopes: tuple[float, ...] | None = None
    dtype: torch.dtype = torch.bfloat16
    with_lse: bool = True
    """Whether lse has a gradient."""

    @property
    def pack(self) -> Documents:
        bounds = [0, *itertools.accumulate(self.documents)]
        return self.ring or Documents.of(bounds, bounds[-1], bounds[-1])

    @property
    def index(self) -> tuple[int, ...]:
        return check_kv_index(self.heads, self.kv_heads, self.kv_index)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def inputs(self) -> dict[str, Tensor]:
        """Those of document b depend on b and its lengths alone."""
        shapes = {"q": (0, self.heads), "k": (1, self.kv_heads), "v": (1, self.kv_heads), "grad_out": (0, self.heads)}
        found, spans = {}, self.pack.spans
        for i, (name, (side, heads)) in enumerate(shapes.items()):
            lengths = [span[side].stop - span[side].start for span in spans]
            parts = [draw(10 * b + i, length, heads, self.head_dim) for b, length in enumerate(lengths)]
            found[name] = torch.cat(parts).to(self.dtype)
        found["grad_lse"] = torch.cat(
            [draw(10 * b + 5, q.stop - q.start, self.heads) for b, (q, _, _) in enumerate(spans)]
        )
        return found

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse) of the reference."""
        options = {"window": self.window, "scale": self.scale, "soft_cap": self.softcap or None}
        options["alibi_slopes"] = self.slopes
        return reference.attention_varlen(q, k, v, self.pack, kv_index=self.index, **options)

    def spec(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The gradients, by autograd."""
        x = {name: t.to(working_dtype(dtype) if name == "grad_lse" else dtype) for name, t in self.inputs().items()}
        leaves = q, k, v = [x[name].requires_grad_() for name in "qkv"]
        out, lse = self.forward(q, k, v)
        seeds = (x["grad_out"], x["grad_lse"] if self.with_lse else torch.zeros_like(lse))
        return dict(zip(GRADS, torch.autograd.grad((out, lse), leaves, seeds), strict=True))


def grads_of(
    case: Case, *, kind: str = "plain", orders: Orders = (FORWARD,), inputs: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The gradients of q, k and v, the same bits in every order; out and lse are the reference's."""
    x = case.inputs() if inputs is None else inputs
    out, lse = case.forward(x["q"], x["k"], x["v"])
    heads = heads_of(case.index, case.kv_heads, torch.device("cpu"))
    work = packed_work(case.pack, 0, heads.group, torch.device("cpu"))
    values = {name: torch.full_like(x[name[-1]], torch.nan) for name in GRADS} | {
        "delta": torch.full_like(lse, torch.nan),
        "grad_out": x["grad_out"],
        "grad_lse": x["grad_lse"] if case.with_lse else None,
        "out": out,
        "lse": lse,
        "q": x["q"],
        "k": x["k"],
        "v": x["v"],
        "query_tiles": work.query_tiles,
        "key_tiles": work.key_tiles,
        "kv_heads": heads.kv_heads,
        "head_starts": heads.starts,
        "heads": heads.order,
        "slopes": None if case.slopes is None else torch.tensor(case.slopes),
        "rows": len(lse),
        "num_query_tiles": len(work.query_tiles),
        "num_key_tiles": len(work.key_tiles),
        "num_heads": case.heads,
        "num_kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "window": case.window or 0,
        "scale": case.scale,
        "softcap": case.softcap,
        "dtype": DTYPES[case.dtype],
    }
    first, *others = call(SOURCE, "attention_varlen_grad", values, kind=kind, orders=orders)
    for name, other in itertools.product(GRADS, others):
        assert other[name].equal(first[name]), name
    return {name: first[name] for name in GRADS}


def check(case: Case, *, kind: str = "plain", orders: Orders = (FORWARD,)) -> None:
    got, plain, exact = grads_of(case, kind=kind, orders=orders), case.spec(case.dtype), case.spec(torch.float64)
    for name in GRADS:
        assert_as_plain(got[name], plain[name], exact[name])


RAGGED = (1, 64, 100, 3, 0, 65)
RING = Documents(
    query_bounds=(0, 1, 66, 66, 130, 140, 145),
    key_bounds=(0, 70, 70, 75, 205, 215, 224),
    offsets=(80, 0, 3, -20, 5, 300),
)
"""One that sees all keys, one without keys, one without queries, one whose first 20 see none, one that sees some more
than its own, one that with a window sees none."""

CASES = {
    "ragged": Case(documents=RAGGED),
    "head 128": Case(documents=RAGGED, head_dim=128, heads=3, kv_heads=1),
    "float16": Case(documents=RAGGED, dtype=torch.float16),
    "uneven heads": Case(documents=(70, 9), heads=5, kv_heads=4, kv_index=(2, 0, 0, 2, 1)),
    "one head each": Case(documents=(33,), kv_heads=2, with_lse=False),
    "window": Case(documents=RAGGED, window=40),
    "window of one": Case(documents=(5, 70), window=1),
    "soft cap": Case(documents=(5, 70), softcap=1.5),
    "window and cap": Case(documents=(150,), window=65, softcap=2.0, head_dim=40),
    "float32": Case(documents=(1, 33, 100), dtype=torch.float32, window=50),
    "float32, odd head": Case(documents=(40, 3), dtype=torch.float32, head_dim=37, softcap=2.0),
    "ring": Case(ring=RING),
    "ring, window": Case(ring=RING, window=40, heads=3, head_dim=128, dtype=torch.float16),
    "ring, float32": Case(ring=RING, window=70, softcap=2.0, dtype=torch.float32),
    "odd head": Case(documents=(40, 7), head_dim=5, dtype=torch.float16),
    "slopes": Case(documents=RAGGED, heads=3, slopes=(0.5, 0.06, 0.0)),
    "head 256": Case(documents=RAGGED, head_dim=256, heads=3, kv_heads=1),
    "head 256, float32": Case(documents=(1, 33, 70), head_dim=256, window=40, softcap=2.0, dtype=torch.float32),
    "head 160, odd heads": Case(
        documents=(70, 9), head_dim=160, heads=5, kv_heads=4, kv_index=(2, 0, 0, 2, 1), dtype=torch.float16
    ),
    "ring, head 136": Case(ring=RING, head_dim=136, window=40, slopes=(0.3, 0.02)),
    "ring, slopes": Case(ring=RING, window=70, softcap=2.0, slopes=(0.3, 0.02), dtype=torch.float32),
}


@pytest.mark.parametrize("name", CASES)
def test_as_the_reference(name):
    check(CASES[name], orders=ORDERS[:3])


@pytest.mark.parametrize("name", ["ragged", "window", "float32", "uneven heads", "head 256"])
def test_a_document_doesnt_depend_on_the_others(name):
    """Bit for bit: first of many, or alone."""
    case = CASES[name]
    alone = grads_of(replace(case, documents=(100,)))
    together = grads_of(replace(case, documents=(100, 1, 70)))
    for key, value in alone.items():
        assert together[key][:100].equal(value), key


def test_a_query_doesnt_depend_on_later_ones():
    """A longer document has the same gradients of q where the shorter one ends."""
    long = replace(CASES["ragged"], documents=(140,))
    cut = {name: x[:70] for name, x in long.inputs().items()}
    short = grads_of(replace(long, documents=(70,)), inputs=cut)
    assert short["grad_q"].equal(grads_of(long)["grad_q"][:70])


MUTANTS = {
    "queries are read before all have copied them": (
        "attention_varlen_grad.cu",
        "    __syncthreads();\n    Tile<T, STEP, S, 2> scores, grads;",
        "    Tile<T, STEP, S, 2> scores, grads;",
    ),
    "the gradient of lse is forgotten": (
        "attention_varlen_grad.cu",
        "a.grad_lse ? sum - a.grad_lse[pair] : sum",
        "sum",
    ),
    "the last queries of a window are left out": (
        "attention_varlen_grad.cu",
        "int64_t(d.start) + S - 1 -",
        "int64_t(d.start) -",
    ),
    "queries that see the keys from before are left out": (
        "attention_varlen_grad.cu",
        "max(d.start - d.offset, 0)",
        "d.start",
    ),
    "an offset is forgotten": ("attention_varlen_grad.cu", "query + offset - key", "query - key"),
    "a slope's offset is forgotten": ("attention_varlen_grad.cu", "key - query - d.offset", "key - query"),
    "a slope for the cap is forgotten": ("attention_varlen_grad.cu", " * scoring.slope(s)", ""),
}
"""What stands there instead: these cases must notice."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, *MUTANTS[name])

    def verify() -> None:
        check(CASES["window and cap"], orders=ORDERS[:3])
        check(CASES["ring, float32"])
        check(CASES["ring, slopes"])

    with pytest.raises(AssertionError):
        verify()


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_sanitizers(kind):
    for name, documents in {"ragged": (66, 3), "head 128": (40,), "float32": (35,), "odd head": (33,)}.items():
        case = replace(CASES[name], documents=documents, heads=2, window=50)
        check(case, kind=kind, orders=(FORWARD, seeded(4)))
    check(CASES["ring"], kind=kind)
    check(CASES["ring, float32"], kind=kind)
    for name in ("head 256", "head 256, float32"):
        check(replace(CASES[name], documents=(35,)), kind=kind)


def test_a_head_that_no_kernel_takes():
    with pytest.raises(AssertionError, match=r"\[1\]"):
        grads_of(Case(documents=(4,), head_dim=264))
