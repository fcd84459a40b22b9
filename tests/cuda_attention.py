"""Attention of the CUDA backend, over pages, documents and prefixes; run by `tests.cuda_backend`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any
from unittest import mock

from torch import Tensor

from kernels import cuda_prefix, reference
from kernels.dispatch import CUDA, REFERENCE
from kernels.documents import Documents
from kernels.ops import Ops
from tests.cuda_compare import Tensors, compare, exactly
from tests.cuda_host import DTYPES, assert_as_plain, draw


def check_attention_paged() -> None:
    """With prefixes, a window, a cap, slopes and heads shared unevenly."""
    options: dict[str, Any] = {"kv_index": (0, 1, 1, 0, 0), "window": 60, "scale": 0.2, "soft_cap": 3.0}
    options["alibi_slopes"] = [0.1, 0.2, 0.3, 0.4, 0.5]
    tables: dict[str, Any] = {"page_size": 16, "prefix_lengths": [0, 20, 3], "prefix_tables": [[], [20, 21], [22]]}

    def attend(ops: Ops, t: Tensors) -> Sequence[Tensor]:
        layout = ops.paged_layout([1, 50, 9], [200, 90, 9], [range(13), range(13, 19), [19]], **tables)
        return (ops.attention_paged(t["q"], t["k"], t["v"], layout, **options)[0],)

    inputs = {"q": draw(0, 60, 5, 64), "k": draw(1, 23, 16, 2, 64), "v": draw(2, 23, 16, 2, 64)}
    for dtype in DTYPES:
        compare(attend, exactly(inputs), dtype)


def check_attention_varlen() -> None:
    """Values and gradients, of wide heads too; `Documents`."""
    bounds, options = [0, 1, 40, 40, 60], {"kv_index": (0, 1, 1, 0, 0), "window": 9, "scale": 0.2, "soft_cap": 2.0}

    def attend(ops: Ops, t: Tensors, **more: Any) -> Sequence[Tensor]:
        return ops.attention_varlen(t["q"], t["k"], t["v"], bounds, **(options | more))

    for dtype in DTYPES:
        for head_dim in (64, 24, 128):
            shapes = {"q": (60, 5, head_dim), "k": (60, 2, head_dim), "v": (60, 2, head_dim)}
            inputs = exactly({name: draw(i, *shape) for i, (name, shape) in enumerate(shapes.items())})
            compare(attend, inputs, dtype)
            compare(attend, inputs, dtype, grad=True)
            for only in (0, 1):  # a gradient of out alone, or of lse alone
                compare(
                    lambda o, t, i=only: (attend(o, t)[i], *(x.sum() * 0 for x in t.values())), inputs, dtype, grad=True
                )
            compare(lambda o, t: attend(o, t, alibi_slopes=[0.1, 0.2, 0.3, 0.0, 0.5]), inputs, dtype, grad=True)
    ring = Documents(query_bounds=(0, 20, 60), key_bounds=(0, 50, 60), offsets=(-3, 25))
    for dtype in DTYPES:
        shapes = {"q": (60, 4, 64), "k": (60, 2, 64), "v": (60, 2, 64)}
        inputs = exactly({name: draw(i, *shape) for i, (name, shape) in enumerate(shapes.items())})
        for window in (None, 20):
            compare(
                lambda o, t, w=window: o.attention_varlen(*t.values(), ring, window=w, scale=0.2)[:1], inputs, dtype
            )
            compare(
                lambda o, t, w=window: o.attention_varlen(*t.values(), ring, window=w, scale=0.2),
                inputs,
                dtype,
                grad=True,
            )
        shapes = {"q": (60, 5, 256), "k": (60, 2, 256), "v": (60, 2, 256)}
        wide = exactly({name: draw(i, *shape) for i, (name, shape) in enumerate(shapes.items())})
        compare(attend, wide, dtype)
        compare(attend, wide, dtype, grad=True)
    _check_parts_of_the_keys()
    _check_sharp_scores()


def _check_parts_of_the_keys() -> None:
    """Gradients of a step of ring attention: of some keys, from out and lse over all."""
    options = {"kv_index": (0, 1, 1, 0), "scale": 0.2}
    part = Documents(query_bounds=(0, 60), key_bounds=(0, 30), offsets=(0,))

    def gradients(ops: Ops, t: Tensors) -> Sequence[Tensor]:
        out, lse = ops.attention_varlen(t["q"], t["k"], t["v"], [0, 60], **options)
        first = (t["k"][:30], t["v"][:30])
        return ops.attention_varlen_backward(t["grad"], None, t["q"], *first, out, lse, part, **options)

    shapes = {"q": (60, 4, 64), "k": (60, 2, 64), "v": (60, 2, 64), "grad": (60, 4, 64)}
    inputs = exactly({name: draw(i, *shape) for i, (name, shape) in enumerate(shapes.items())})
    for dtype in DTYPES:
        compare(gradients, inputs, dtype)


def _check_sharp_scores() -> None:
    """Weights that are almost all of one key, where the gradients feel each rounding of lse."""
    for head_dim in (64, 128, 256):
        shapes = {"q": (100, 4, head_dim), "k": (100, 2, head_dim), "v": (100, 2, head_dim)}
        inputs = exactly({name: draw(i, *shape) for i, (name, shape) in enumerate(shapes.items())})
        inputs["q"] = inputs["q"] * 8
        for dtype in DTYPES:
            for grad in (False, True):
                compare(
                    lambda o, t, h=head_dim: o.attention_varlen(*t.values(), [0, 100], scale=h**-0.5)[:1],
                    inputs,
                    dtype,
                    grad=grad,
                )


def check_prefix() -> None:
    """Attention over a prefix and its merge: values and gradients, row-invariance, odd cases."""
    _check_prefix_gradients()
    _check_prefix_alone()


@mock.patch.object(cuda_prefix, "GRADIENT_QUERIES", 16)
def _check_prefix_gradients() -> None:
    """Of more queries than share a copy of the prefix, with and without the merge."""
    for rows, entries, heads in ((37, 20, 64), (7, 70, 256), (5, 1, 24), (3, 0, 64)):
        shapes = {"q": (rows, 5, heads)} | dict.fromkeys("kv" if entries else "", (entries, 2, heads))
        inputs = exactly({name: draw(i, *shape) for i, (name, shape) in enumerate(shapes.items())})
        inputs |= exactly({"own_k": draw(7, rows, 2, heads), "own_v": draw(8, rows, 2, heads)})
        options: dict[str, Any] = {"kv_index": (0, 1, 1, 0, 0), "scale": heads**-0.5}

        def attend(
            ops: Ops, t: Tensors, *, merged: bool, rows: int = rows, options: dict[str, Any] = options
        ) -> Sequence[Tensor]:
            key, value = (t.get(name, t["own_k"][:0]) for name in "kv")
            part = ops.attention_prefix(t["q"], key, value, soft_cap=3.0, **options)
            own = ops.attention_varlen(t["q"], t["own_k"], t["own_v"], [0, rows // 3, rows], **options)
            return ops.merge_attention((part, own)) if merged else (*part, own[0])

        for dtype in DTYPES:
            compare(lambda o, t: attend(o, t, merged=True), inputs, dtype)
            compare(lambda o, t: attend(o, t, merged=True), inputs, dtype, grad=True)
            for only in (0, 1) if rows < 9 else ():  # a gradient of out alone, or of lse alone
                compare(
                    lambda o, t, i=only: (attend(o, t, merged=True)[i], *(x.sum() * 0 for x in t.values())),
                    inputs,
                    dtype,
                    grad=True,
                )
            if entries:
                compare(lambda o, t: attend(o, t, merged=False), inputs, dtype, grad=True)


def _check_prefix_alone() -> None:
    """The bits of a query don't depend on how many there are; three parts; no rows; nothing of the reference runs."""
    q, k, v = draw(1, 300, 4, 64).bfloat16(), draw(2, 20, 2, 64).bfloat16(), draw(3, 20, 2, 64).bfloat16()
    parts = [CUDA.attention_prefix(q, k[i : i + 5], v[i : i + 5], scale=0.2) for i in (0, 5, 10)]
    exact = REFERENCE.attention_prefix(q.double(), k[:15].double(), v[:15].double(), scale=0.2)
    for got, plain, wanted in zip(CUDA.merge_attention(parts), REFERENCE.merge_attention(parts), exact, strict=True):
        assert_as_plain(got, plain, wanted)
    with mock.patch.multiple(reference, _attend=None, attention_varlen=None, merge_attention=None, embedding=None):
        out, lse = CUDA.attention_prefix(q, k, v, scale=0.2)
        leaf = k.clone().requires_grad_()
        again = CUDA.attention_prefix(q, leaf, v, scale=0.2)
        assert again[0].equal(out) and again[1].equal(lse)
        CUDA.merge_attention((again, (out, lse)))[0].sum().backward()
        assert leaf.grad is not None
        for i in (0, 299):
            alone = CUDA.attention_prefix(q[i : i + 1], k, v, scale=0.2)
            assert alone[0].equal(out[i : i + 1]) and alone[1].equal(lse[i : i + 1])
        none = CUDA.attention_prefix(q[:0], leaf, v, scale=0.2)
        assert none[0].shape == (0, 4, 64) and CUDA.merge_attention((none, none))[1].shape == (0, 4)
    named = {f.name for f in fields(CUDA) if getattr(getattr(CUDA, f.name), "__module__", "") == reference.__name__}
    assert named == {"log_softmax", "rotary_angles"}
