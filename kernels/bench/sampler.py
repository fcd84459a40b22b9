"""Draws and log-probabilities: the compiled form, numpy's, and a plain sort in torch, microseconds a row."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import sampling
from kernels.bench import timing
from kernels.memory import keep_freed_memory

ROUNDS = 7
SETTINGS = {
    "temperature 1": (1.0, 0, 1.0, 0.0),
    "top_p 0.9": (1.0, 0, 0.9, 0.0),
    "top_k 50": (1.0, 50, 1.0, 0.0),
    "min_p 0.05": (1.0, 0, 1.0, 0.05),
    "temperature 2, top_p 0.95": (2.0, 0, 0.95, 0.0),
}
"""(temperature, top_k, top_p, min_p)."""


def run() -> str:
    """One row and a batch of 32, of two vocabularies, for logits of several shapes."""
    keep_freed_memory()  # as the server does
    compiled = sampling.select(torch.device("cpu"))
    lines = [f"{torch.get_num_threads()} threads. Microseconds a row, median of {ROUNDS} calls, in turn.\n"]
    names = (compiled.name, "numpy", "torch sort")
    lines.append("| vocabulary | rows | logits | asked for | " + " | ".join(names) + " |")
    lines.append("|---" * (4 + len(names)) + "|")
    for vocab in (49152, 151936):
        for batch in (1, 32):
            for kind, logits_BV in _logits(batch, vocab).items():
                for setting, numbers in SETTINGS.items():
                    if kind != "normal" and setting not in ("temperature 1", "top_p 0.9"):
                        continue
                    all_rows, one_row = _arguments(batch, numbers), _arguments(1, numbers)
                    t = timing.interleaved(
                        {
                            "ours": lambda a=all_rows, x=logits_BV: compiled.draw(x, *a),
                            "numpy": lambda a=one_row, x=logits_BV[:1]: sampling.draw(x, *a),
                            "torch": lambda n=numbers, x=logits_BV[:1]: _torch_draw(x, *n),
                        },
                        repeats=ROUNDS,
                    )
                    cells = (t["ours"] / batch, t["numpy"], t["torch"])
                    row = " | ".join(f"{cell * 1e6:.0f}" for cell in cells)
                    lines.append(f"| {vocab} | {batch} | {kind} | {setting} | {row} |")
            rows, top = torch.arange(batch), torch.full((batch,), 5)
            logits_BV = _logits(batch, vocab)["normal"]
            t = timing.interleaved(
                {
                    "ours": lambda x=logits_BV, r=rows, k=top: compiled.logprobs(x, r, r, k),
                    "numpy": lambda x=logits_BV, r=rows[:1], k=top[:1]: sampling.logprobs(x[:1], r, r, k),
                    "torch": lambda x=logits_BV: x[:1].log_softmax(-1).topk(5),
                },
                repeats=ROUNDS,
            )
            cells = (t["ours"] / batch, t["numpy"], t["torch"])
            row = " | ".join(f"{cell * 1e6:.0f}" for cell in cells)
            lines.append(f"| {vocab} | {batch} | normal | 5 log-probabilities | {row} |")
    return "\n".join(lines)


def _logits(batch: int, vocab: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(batch, vocab, generator=generator) * 3
    outlier = normal * 1e-3
    outlier[:, 0] = -30.0
    return {
        "normal": normal,
        "flat": normal * 1e-2,
        "of bfloat16": normal.bfloat16().float(),
        "all but one within 0.03": outlier,
    }


def _arguments(batch: int, numbers: tuple[float, int, float, float]) -> tuple[Tensor, ...]:
    temperature, top_k, top_p, min_p = numbers
    t, p, m = (torch.full((batch,), x, dtype=torch.float64) for x in (temperature, top_p, min_p))
    return torch.arange(batch), t, torch.full((batch,), top_k), p, m, torch.rand(batch, dtype=torch.float64)


def _torch_draw(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The usual form: sort, softmax, running sum, mask, draw."""
    values, ids = logits_BV.sort(descending=True)
    probabilities = (values / temperature).softmax(-1)
    if min_p:
        probabilities = probabilities * (probabilities >= min_p * probabilities[:, :1])
    if top_k:
        probabilities[:, top_k:] = 0
    if top_p < 1:
        sums = probabilities.cumsum(-1)
        probabilities = probabilities * (sums - probabilities < top_p * sums[:, -1:])
    return ids.gather(1, probabilities.multinomial(1))
