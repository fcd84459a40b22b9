"""Draws and log-probabilities of the CUDA backend and the server's sampler; run by `tests.cuda_backend`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import cuda_sampling, sampling
from serve.request import INVALID_TOKEN, Request, SamplingParams
from serve.sampler import Sampler


def check_draws() -> None:
    """The tokens that the host draws; their numbers are copied once."""
    _check_one_copy()
    generator = torch.Generator().manual_seed(3)
    logits, count = torch.randn(5, 1000, generator=generator) * 3, 40
    rows = torch.randint(0, 5, (count,), generator=generator)
    temperature = torch.rand(count, generator=generator, dtype=torch.float64)
    temperature[::7] = 0
    top_k, top_p, min_p, u = (
        torch.randint(0, 50, (count,), generator=generator),
        *torch.rand(3, count, generator=generator, dtype=torch.float64),
    )
    numbers = (temperature, top_k, top_p, min_p * 0.1, u)
    assert cuda_sampling.draw(logits, rows, *numbers).equal(sampling.draw(logits, rows, *numbers))
    empty = [x[:0] for x in (rows, *numbers)]
    assert cuda_sampling.draw(logits, *empty).shape == (0,)
    asked = (rows, torch.arange(count), torch.arange(count) % 7)
    for got, wanted in zip(cuda_sampling.logprobs(logits, *asked), sampling.logprobs(logits, *asked), strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        assert got.equal(wanted) if got.dtype == torch.int64 else got.allclose(wanted, rtol=0, atol=1e-9)
    found, top_ids, top_values = cuda_sampling.logprobs(logits, *(x[:0] for x in asked))
    assert found.shape == (0,) and top_ids.shape == top_values.shape == (0, 0)


def check_sampler() -> None:
    """The server's sampler with the ops of the GPU: the host's tokens and log-probabilities, adjusted rows among them."""
    on_gpu = sampling.SamplingOps(name="cuda", draw=cuda_sampling.draw, logprobs=cuda_sampling.logprobs, device="cpu")
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(4)) * 3
    logits[4, 3] = torch.nan
    params: Sequence[dict[str, Any]] = (
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 20, "logprobs": 5},
        {"repetition_penalty": 1.3, "logprobs": 2},
        {"top_p": 0.8, "min_p": 0.01},
        {"logprobs": 1},
        {"logit_bias": ((7, 20.0),), "logprobs": 0},
    )
    requests = [Request(id=str(i), prompt=(1, 2), sampling=SamplingParams(**one)) for i, one in enumerate(params)]
    for output in ([], [7, 7, 9]):
        histories = [[*request.prompt, *output] for request in requests]
        (ids, details), (wanted_ids, wanted) = (
            Sampler(frozenset({2}), ops).sample(logits, requests, histories) for ops in (on_gpu, sampling.NUMPY)
        )
        assert ids == wanted_ids and ids[4] == INVALID_TOKEN and details[4] is None
        for one, other in zip(details, wanted, strict=True):
            if one is None or other is None:
                assert one is other
                continue
            assert one.id == other.id and [id for id, _ in one.top] == [id for id, _ in other.top]
            values, others = ([x.logprob, *(value for _, value in x.top)] for x in (one, other))
            assert torch.tensor(values, dtype=torch.float64).allclose(
                torch.tensor(others, dtype=torch.float64), rtol=0, atol=1e-9
            )


class _Copies(TorchDispatchMode):
    """Counts copies from one device to another."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {x.device for x in (result, *args) if isinstance(x, torch.Tensor)}
        self.count += len(devices) > 1
        return result


def _check_one_copy() -> None:
    """What a draw needs besides the logits reaches another device in one copy, with its values and dtypes."""
    numbers = {"rows": torch.tensor([2, 0, 1]), "u": torch.rand(6, dtype=torch.float64)[::2], "top_k": torch.arange(3)}
    moved = cuda_sampling.moved("draw", numbers, torch.device("cpu"))
    assert all(got.equal(x) and got.is_contiguous() for got, x in zip(moved, numbers.values(), strict=True))
    with _Copies() as copies:
        elsewhere = cuda_sampling.moved("draw", numbers, torch.device("meta"))
    assert copies.count == 1
    assert [(x.dtype, x.shape, x.device.type) for x in elsewhere] == [(x.dtype, (3,), "meta") for x in moved]
