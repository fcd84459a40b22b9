"""What the CUDA ops and their wrappers refuse, and how; run by `tests.cuda_backend` on the host executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cuda_sampling
from kernels.cuda_layout import CudaLayout, heads_of, packed_work
from kernels.dispatch import CUDA, REFERENCE
from kernels.documents import Documents
from kernels.ops import LowRank, Packed
from tests.cuda_host import draw


def refused(text: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """The call raises an error whose first line holds the text."""
    with pytest.raises((RuntimeError, ValueError)) as error:
        call(*arguments, **options)
    assert text in str(error.value).splitlines()[0], f"{text!r} isn't in {error.value}"


class Fuzz:
    """Calls an op with one argument changed at a time: each change is an error that names the argument."""

    def __init__(self, op: str, arguments: dict[str, Any], message: str | None = None) -> None:
        """`message`: the op's name in its messages, where it is another."""
        self.op, self.arguments, self.message = op, arguments, message or op

    def refuses(self, name: str, value: Any, text: str = "") -> None:
        """With `name` = value the op raises `<op>: ... <name> ... <text>`."""
        changed = self.arguments | {name: value}
        with pytest.raises(RuntimeError) as error:
            getattr(torch.ops.onemesh_cuda, self.op)(**changed)
        line = str(error.value).splitlines()[0]
        assert f"{self.message}: " in line and name in line and text in line, line

    def run(self) -> None:
        """Every tensor in another dtype, with another size in each dim, with another rank, with gaps in its rows."""
        getattr(torch.ops.onemesh_cuda, self.op)(**self.arguments)
        for name, x in self.arguments.items():
            if not isinstance(x, Tensor):
                continue
            self.refuses(name, x.bool())
            self.refuses(name, x[None])
            if x.dim() > 1 and x.shape[-1] > 1 and x.numel():
                self.refuses(name, x.repeat_interleave(2, -1)[..., ::2], "contiguous")
            self.refuses(name, x.to(torch.float64 if x.dtype != torch.float64 else torch.float32))


def check_arguments() -> None:
    """Wrong dtypes, ranks, sizes, strides and numbers of every op; what Python refuses before an op is called."""
    _check_rows()
    _check_linears()
    _check_logits()
    _check_attention()
    _check_wrappers()


ROWS, WEIGHT = draw(1, 6, 4), draw(2, 3, 4)
HEADS, KV_HEADS = draw(3, 6, 2, 4), draw(4, 6, 1, 4)
PAGES = draw(5, 3, 4, 1, 4)
SLOTS = torch.arange(6)


def _check_rows() -> None:
    norm = Fuzz("rms_norm", {"x": ROWS, "weight": WEIGHT[0], "eps": 1e-5})
    norm.run()
    norm.refuses("weight", WEIGHT[0, :3], "size 3 in dim 0, not 4")
    residual = Fuzz("add_rms_norm", norm.arguments | {"residual": ROWS}, message="rms_norm")
    residual.run()
    residual.refuses("residual", ROWS[:5], "size 5 in dim 0, not 6")
    gate = Fuzz("gate", {"gate": ROWS, "up": ROWS, "activation": 1})
    gate.run()
    gate.refuses("up", ROWS[:2], "size 2 in dim 0, not 6")
    gate.refuses("activation", 2, "must be 0 or 1")
    rotary = Fuzz("rotary", {"x": HEADS, "cos": ROWS, "sin": ROWS})
    rotary.run()
    rotary.refuses("cos", ROWS[:3], "size 3 in dim 0, not 6")
    rotary.refuses("sin", WEIGHT[:, :3].contiguous(), "size 3 in dim 0, not 6")
    rotary.refuses("x", HEADS[..., :3].contiguous(), "odd head dim 3")
    gather = Fuzz("embedding", {"weight": WEIGHT, "ids": SLOTS})
    gather.run()
    rows = {"grad": ROWS, "ids": SLOTS, "places": SLOTS, "out": torch.zeros(3, 4)}
    scatter = Fuzz("embedding_grad", rows)
    scatter.run()
    scatter.refuses("ids", SLOTS[:5], "size 5 in dim 0, not 6")
    scatter.refuses("places", SLOTS[:5], "size 5 in dim 0, not 6")
    scatter.refuses("out", torch.zeros(3, 5), "size 5 in dim 1, not 4")
    pages = {"k": KV_HEADS, "v": KV_HEADS, "key_cache": PAGES.clone(), "value_cache": PAGES.clone(), "slots": SLOTS}
    for fuzz in (Fuzz("write_pages", pages), Fuzz("rotary_write", rotary.arguments | {"q": HEADS} | pages)):
        fuzz.arguments.pop("x", None)
        fuzz.run()
        fuzz.refuses("slots", SLOTS[:5], "size 5 in dim 0, not 6")
        fuzz.refuses("v", HEADS, "size 2 in dim 1, not 1")
        fuzz.refuses("key_cache", PAGES[..., :2].contiguous(), "size 2 in dim 3, not 4")
        fuzz.refuses("value_cache", PAGES[:1], "size 1 in dim 0, not 3")


def _check_linears() -> None:
    linear = Fuzz("linear", {"x": ROWS, "weight": WEIGHT, "bias": WEIGHT[:, 0].contiguous(), "wide": False})
    linear.run()
    linear.refuses("weight", WEIGHT[:, :3].contiguous(), "size 3 in dim 1, not 4")
    linear.refuses("bias", WEIGHT[0], "size 4 in dim 0, not 3")
    grad = draw(6, 6, 3)
    grad_x = Fuzz("linear_grad_input", {"grad": grad, "weight": WEIGHT, "wide": True})
    grad_x.run()
    grad_x.refuses("weight", WEIGHT[:2], "size 2 in dim 0, not 3")
    grad_w = Fuzz("linear_grad_weight", {"grad": grad, "x": ROWS, "out": torch.zeros(3, 4)})
    grad_w.run()
    grad_w.refuses("x", ROWS[:5], "size 5 in dim 0, not 6")
    grad_w.refuses("out", torch.zeros(3, 4).half(), "float32")
    grad_w.refuses("out", torch.zeros(4, 4), "size 4 in dim 0, not 3")
    low_rank = {"x": ROWS, "out": grad, "hidden": draw(9, 6, 2), "a": [*draw(7, 2, 2, 4)], "b": [*draw(8, 2, 3, 2)]}
    lora = Fuzz("lora", low_rank | {"items": torch.tensor([[0, 0, 6]])})
    lora.run()
    lora.refuses("out", grad[:5], "size 5 in dim 0, not 6")
    lora.refuses("hidden", draw(9, 5, 2), "size 5 in dim 0, not 6")
    lora.refuses("hidden", draw(9, 6, 1), "has 1 columns, a factor in a 2 rows")
    lora.refuses("a", [*draw(7, 2, 2, 5)], "size 5 in dim 1, not 4")
    lora.refuses("a", [draw(7, 2, 4), draw(7, 2, 4).half()], "another dtype than x")
    lora.refuses("a", [draw(7, 2, 4), draw(7, 4, 2).t()], "not contiguous")
    for most in (0, 65):
        lora.refuses("a", [draw(7, 2, 4)] * most, f"has {most} factors, not 1 to 64")
    lora.refuses("b", [draw(8, 3, 2)], "has 1 factors, a 2")
    lora.refuses("b", [*draw(8, 2, 3, 4)], "size 4 in dim 1, not 2")
    lora.refuses("b", [*draw(8, 2, 2, 2)], "size 2 in dim 0, not 3")
    lora.refuses("items", torch.zeros(2, 2, dtype=torch.int64), "size 2 in dim 1, not 3")


def _check_logits() -> None:
    Fuzz("log_sum_exp", {"logits": ROWS}).run()
    gradient = Fuzz("loss_gradient", {"logits": ROWS, "lse": ROWS[:, 0].contiguous(), "target": SLOTS, "dtype": 2})
    gradient.run()
    gradient.refuses("lse", ROWS[:5, 0].contiguous(), "size 5 in dim 0, not 6")
    gradient.refuses("target", SLOTS[1:], "size 5 in dim 0, not 6")
    gradient.refuses("dtype", 3, "must be 0, 1 or 2")
    gradient.refuses("dtype", -1, "must be 0, 1 or 2")
    Fuzz("loss_gradient", gradient.arguments | {"logits": ROWS.half()}).refuses("dtype", 2, "that of logits")
    numbers = dict.fromkeys(("temperature", "top_p", "min_p", "u"), torch.rand(3, dtype=torch.float64))
    drawn = Fuzz("draw", {"logits": ROWS, "rows": SLOTS[:3], "top_k": SLOTS[:3]} | numbers)
    drawn.run()
    drawn.refuses("logits", ROWS.half(), "float32")
    drawn.refuses("logits", ROWS[:, :0].contiguous(), "has 0 columns")
    drawn.refuses("logits", torch.zeros(1, (1 << 20) + 1), "1048577 columns")
    for name in ("top_k", *numbers):
        drawn.refuses(name, drawn.arguments[name][:2], "size 2 in dim 0, not 3")
    chosen = {"rows": SLOTS[:3], "ids": SLOTS[:3], "num_top": SLOTS[:3]}
    logprobs = Fuzz("logprobs", {"logits": ROWS, "most": 2} | chosen)
    logprobs.run()
    logprobs.refuses("logits", ROWS.half(), "float32")
    logprobs.refuses("logits", torch.zeros(1, (1 << 20) + 1), "1048577 columns")
    for name in ("ids", "num_top"):
        logprobs.refuses(name, SLOTS[:2], "size 2 in dim 0, not 3")
    for most in (-1, 5):
        logprobs.refuses("most", most, "must be 0 to 4")


def _check_attention() -> None:
    shared = heads_of((0, 0), 1, torch.device("cpu"))
    heads = {"head_starts": shared.starts, "heads": shared.order}
    scores = {"window": 0, "scale": 1.0, "softcap": 0.0}
    packed, lse = packed_work(Documents.of([0, 6], 6, 6), 0, 2, torch.device("cpu")), draw(5, 6, 2)
    varlen = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS} | heads | scores
    forward = Fuzz("attention_varlen", varlen | {"chunks": packed.chunks, "slopes": lse[0], "whole": packed.whole})
    tiles = {"query_tiles": packed.query_tiles, "key_tiles": packed.key_tiles, "kv_heads": shared.kv_heads}
    given = {"out": HEADS, "lse": lse, "grad_out": HEADS, "grad_lse": lse}
    backward = Fuzz("attention_varlen_grad", varlen | given | tiles | {"slopes": lse[0]})
    backward.refuses("lse", lse[:5], "size 5 in dim 0, not 6")
    backward.refuses("grad_lse", lse[:, :1].contiguous(), "size 1 in dim 1, not 2")
    backward.refuses("grad_out", HEADS[:5], "size 5 in dim 0, not 6")
    backward.refuses("out", HEADS[..., :2].contiguous(), "size 2 in dim 2, not 4")
    backward.refuses("kv_heads", shared.order[:1], "size 1 in dim 0, not 2")
    backward.refuses("query_tiles", packed.whole, "size 2 in dim 1, not 6")
    backward.refuses("key_tiles", packed.whole, "size 2 in dim 1, not 6")
    wide = {name: varlen[name].repeat(1, 1, 65) for name in "qkv"}
    Fuzz(backward.op, backward.arguments | wide).refuses("q", wide["q"], "head dim that isn't 1 to 256: 260")

    parts = {"first": HEADS, "first_lse": lse, "second": HEADS, "second_lse": lse}
    merge = Fuzz("attention_merge", parts)
    merge_grad = Fuzz("attention_merge_grad", parts | {"grad_out": HEADS, "grad_lse": lse})
    merge_grad.refuses("grad_out", HEADS[:5], "size 5 in dim 0, not 6")
    merge_grad.refuses("grad_lse", lse[:5], "size 5 in dim 0, not 6")
    for fuzz in (merge, merge_grad):
        fuzz.run()
        fuzz.refuses("second", KV_HEADS, "size 1 in dim 1, not 2")
        fuzz.refuses("first_lse", lse[:5], "size 5 in dim 0, not 6")
        fuzz.refuses("second_lse", lse[:, :1].contiguous(), "size 1 in dim 1, not 2")

    layout = CudaLayout.build([2, 4], [2, 4], [[0], [1]], page_size=4)
    work = layout.work(0, 2)
    tables = {"chunks": layout.chunks, "block_table": layout.block_table_BM, "prefix_table": layout.prefix_table_BM}
    lists = {name: getattr(work, name) for name in ("whole", "split", "merges", "partial_rows", "max_split_queries")}
    pages = {"q": HEADS, "key_cache": PAGES, "value_cache": PAGES, "slopes": lse[0]}
    paged = Fuzz("attention_paged", pages | heads | scores | tables | lists)
    two = PAGES.repeat(1, 1, 2, 1)
    Fuzz(paged.op, paged.arguments | {"value_cache": two}).refuses("key_cache", two, "size 2 in dim 2, not 1")
    paged.refuses("value_cache", PAGES[:2], "size 2 in dim 0, not 3")
    paged.refuses("block_table", layout.block_table_BM[:1], "size 1 in dim 0, not 2")
    paged.refuses("split", work.merges, "size 2 in dim 1, not 3")
    paged.refuses("partial_rows", -1, "negative")
    for fuzz in (forward, backward, paged):
        fuzz.run()
        fuzz.refuses("heads", shared.order[:1], "size 1 in dim 0, not 2")
        fuzz.refuses("slopes", lse[0, :1], "size 1 in dim 0, not 2")
        fuzz.refuses("head_starts", shared.starts[:0], "empty")
        fuzz.refuses("window", -1, "must be 0, for none, or up to 2^30")
        fuzz.refuses("window", 1 << 31, "must be 0, for none, or up to 2^30")
        fuzz.refuses("softcap", -1.0, "must be 0, for none, or positive")
    for fuzz in (forward, backward):
        fuzz.refuses("v", KV_HEADS[:5], "size 5 in dim 0, not 6")
        fuzz.refuses("v", HEADS, "size 2 in dim 1, not 1")


def _check_wrappers() -> None:
    """What Python refuses before an op is called."""
    x, w = draw(1, 6, 4), draw(2, 3, 4)
    refused("linear: x (6, 4) and w (3, 3)", CUDA.linear, x, w[:, :3])
    refused("linear: bias (4,)", CUDA.linear, x, w, w[0])
    refused("linear: x is torch.float32, w is torch.float64", CUDA.linear, x, w.double())
    refused("linear: x must be float32, float16 or bfloat16", CUDA.linear, x.double(), w.double())
    update = LowRank(start=2, stop=7, a_RK=draw(3, 2, 4), b_NR=draw(4, 3, 2))
    refused("linear: update of rows 2 .. 7", CUDA.linear, x, w, None, [update])
    short = replace(update, stop=5, x_TK=x[:2])
    refused("lora: out has size 6 in dim 0, not 5", CUDA.linear, x, w, None, [short])
    refused("packed for another backend", CUDA.linear, x, Packed(w, (3, 4), lambda p: p))
    numbers = (torch.ones(2), torch.tensor([0, 0]), torch.ones(2), torch.ones(2), torch.zeros(2))
    for rows in ([0, 6], [-1, 0]):
        refused(f"rows={rows} must lie in 0..5", cuda_sampling.draw, x, torch.tensor(rows), *numbers)
    names = ("temperature", "top_k", "top_p", "min_p", "u")
    drawn = dict(zip(names, (x.double() for x in numbers), strict=True)) | {"top_k": numbers[1]}
    both = torch.tensor([0, 1])
    for name, wrong in (("u", torch.ones(2)), ("top_k", both.int()), ("min_p", torch.ones(1).double())):
        text = f"draw: {name} is {wrong.dtype} ({len(wrong)},), must be int64 or float64 (2,)"
        refused(text, cuda_sampling.draw, x, both, *(drawn | {name: wrong}).values())
    refused("draw: top_k must be int64", cuda_sampling.draw, x, both, *(drawn | {"top_k": drawn["u"]}).values())
    for name, values, end in (("rows", [0, 6], 5), ("ids", [-1, 3], 3), ("ids", [0, 4], 3), ("num_top", [0, 5], 4)):
        chosen = dict.fromkeys(("rows", "ids", "num_top"), torch.tensor([0, 1])) | {name: torch.tensor(values)}
        refused(f"{name}={values} must lie in 0..{end}", cuda_sampling.logprobs, x, *chosen.values())
    far = Documents(query_bounds=(0, 6), key_bounds=(0, 6), offsets=(1 << 30,))
    refused("offsets=(1073741824,) must lie", CUDA.attention_varlen, HEADS, KV_HEADS, KV_HEADS, far, scale=1.0)
    refused("dtype=torch.float64 must be one of", CUDA.loss_gradient, x, x[:, 0], torch.arange(6), torch.float64)
    refused("linear_grad_weight: out is not contiguous", CUDA.add_weight_gradient, draw(1, 4, 3).t(), draw(2, 6, 3), x)
    plain = REFERENCE.paged_layout([1], [1], [[0]], page_size=4)
    q, cache = torch.zeros(1, 2, 4), torch.zeros(1, 4, 2, 4)
    refused("layout must come from this backend's", CUDA.attention_paged, q, cache, cache, plain, scale=1.0)
    layout = CudaLayout.build([1], [1], [[0]], page_size=4)
    refused("window=0 must be at least 1", CUDA.attention_paged, q, cache, cache, layout, window=0, scale=1.0)
