"""Chooses each request's next token from its logits.

Order of operations, as in vLLM and transformers:

    logits -> min_tokens mask, logit_bias -> repetition, then frequency and presence penalty
           -> greedy: argmax, ties to the lowest id
           -> else:   / temperature -> min_p -> top_k -> top_p -> one draw

A draw is the inverse CDF of what is left, sorted by falling logit (ties by rising id), at one uniform number
that is a hash of (request seed, index of the token in the output). So there is no generator state: a request
gets the same tokens in any batch, after preemption, and on any rank. `kernels.sampling` defines it to the bit.

Rows that need no mask, bias or penalty are drawn from in place, where the logits are, all in one call; the others are
copied to the host and changed there. A row's result depends on nothing but its V values and its own request.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import sampling
from kernels.sampling import SamplingOps
from serve.request import INVALID_TOKEN, Request, SamplingParams, TokenLogprob

Row = NDArray[np.float32]


class Sampler:
    """Samples one token per row. Holds the ids that end a text, and what it told the kernel of the last step's rows."""

    def __init__(self, eos_ids: frozenset[int], ops: SamplingOps | None = None) -> None:
        """ops: of the device where the logits are; None for the host's."""
        self._eos_ids, self._ops = eos_ids, ops or _host_ops()
        self._host_ops = self._ops if self._ops.device == "cpu" else _host_ops()
        self._plain = _Columns([], [])

    def sample(
        self, logits_BV: torch.Tensor, requests: Sequence[Request], histories: Sequence[Sequence[int]]
    ) -> tuple[list[int], list[TokenLogprob | None]]:
        """The next token of each row, and its log-probabilities where the request asked for them.

        logits_BV: [B, V] float32 on any device, without gradients, not changed. histories: known tokens of each
        request, prompt then output. A row with a nan or +inf, or with nothing but -inf left to choose from, gets
        `INVALID_TOKEN` and no log-probabilities. These are of the logits as given, before any adjustment.
        """
        assert logits_BV.dtype == torch.float32, logits_BV.dtype
        assert logits_BV.shape[0] == len(requests) == len(histories), (logits_BV.shape, len(requests), len(histories))
        if not logits_BV.is_cpu and self._ops.device == "cpu":
            logits_BV = logits_BV.cpu()
        ids = self._next(logits_BV, requests, histories)
        num_top = {
            row: request.sampling.logprobs
            for row, request in enumerate(requests)
            if request.sampling.logprobs is not None and ids[row] != INVALID_TOKEN
        }
        found: list[TokenLogprob | None] = [None] * len(ids)
        if num_top:
            asked = list(num_top)
            entries = _logprobs(self._ops, logits_BV, asked, [ids[row] for row in asked], list(num_top.values()))
            for row, entry in zip(asked, entries, strict=True):
                found[row] = entry
        return ids, found

    def _next(
        self, logits_BV: torch.Tensor, requests: Sequence[Request], histories: Sequence[Sequence[int]]
    ) -> list[int]:
        given = [len(tokens) - len(request.prompt) for request, tokens in zip(requests, histories, strict=True)]
        plain: list[int] = []
        changed: list[int] = []
        for row, request in enumerate(requests):
            (changed if is_adjusted(request.sampling, given[row]) else plain).append(row)
        ids = [INVALID_TOKEN] * len(requests)
        if plain:
            params = [requests[row].sampling for row in plain]
            if not self._plain.are(plain, params):  # they are while no request comes or goes
                self._plain = _Columns(plain, params)
            numbers = [uniform(requests[plain[i]].seed, given[plain[i]]) for i in self._plain.random]
            for row, id in zip(plain, self._plain.draw(self._ops, logits_BV, numbers), strict=True):
                ids[row] = id
        if changed:
            copies_BV = logits_BV[changed].cpu()
            for row_V, row in zip(copies_BV.numpy(), changed, strict=True):
                is_valid = math.isfinite(row_V.max())
                adjust(row_V, requests[row].sampling, histories[row], given[row], self._eos_ids)
                if not is_valid:  # a masked nan or +inf still says that no number of this row can be trusted
                    row_V[:] = np.nan
            columns = _Columns(range(len(changed)), [requests[row].sampling for row in changed])
            numbers = [uniform(requests[changed[i]].seed, given[changed[i]]) for i in columns.random]
            for row, id in zip(changed, columns.draw(self._host_ops, copies_BV, numbers), strict=True):
                ids[row] = id
        return ids


class _Columns:
    """What `SamplingOps.draw` is told of some rows of logits."""

    random: list[int]
    """Which of the rows need a number: those that aren't greedy."""

    def __init__(self, rows: Sequence[int], params: Sequence[SamplingParams]) -> None:
        self._rows, self._params = rows, params
        self.random = [i for i, one in enumerate(params) if not one.is_greedy]
        self._tensors = (
            _integers(rows),
            _floats([0.0 if one.is_greedy else one.temperature for one in params]),
            _integers([one.top_k for one in params]),
            _floats([one.top_p for one in params]),
            _floats([one.min_p for one in params]),
            _floats([0.0 for _ in params]),
        )
        self._u = memoryview(self._tensors[-1].numpy()).cast("B").cast("d")

    def are(self, rows: Sequence[int], params: Sequence[SamplingParams]) -> bool:
        """Whether they were made for these."""
        return self._rows == rows and self._params == params

    def draw(self, ops: SamplingOps, logits_BV: torch.Tensor, numbers: Sequence[float]) -> list[int]:
        """A token of each row, `numbers` being the uniform ones of the `random` rows."""
        for i, number in zip(self.random, numbers, strict=True):
            self._u[i] = number
        return [INVALID_TOKEN if id < 0 else id for id in ops.draw(logits_BV, *self._tensors).tolist()]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) of 53 random bits: a hash of a request's seed and a token's index in the output."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def is_adjusted(sampling: SamplingParams, num_generated: int) -> bool:
    """Whether mask, bias or penalties apply after this many tokens of output."""
    masks, repeats, counts = _adjustments(sampling, num_generated)
    return masks or repeats or counts or bool(sampling.logit_bias)


def _adjustments(sampling: SamplingParams, num_generated: int) -> tuple[bool, bool, bool]:
    """Whether the mask applies, the repetition penalty, one of the penalties that look at the output."""
    return (
        num_generated < sampling.min_tokens,
        sampling.repetition_penalty != 1,
        bool(num_generated and (sampling.presence_penalty or sampling.frequency_penalty)),
    )


def adjust(
    row_V: Row, sampling: SamplingParams, tokens: Sequence[int], num_generated: int, eos_ids: frozenset[int]
) -> None:
    """Changes the logits by mask, bias and penalties.

    tokens: prompt then output; the last `num_generated` are output.
    """
    masks, repeats, counts = _adjustments(sampling, num_generated)
    if masks:
        row_V[[*sampling.stop_ids, *(() if sampling.ignore_eos else sorted(eos_ids))]] = -np.inf
    for token, bias in sampling.logit_bias:
        row_V[token] += np.float32(bias)
    if repeats:
        seen = list(set(tokens))
        penalty = np.float32(sampling.repetition_penalty)
        values = row_V[seen]
        with np.errstate(over="ignore"):  # logits masked by float32's lowest value
            row_V[seen] = np.where(values < 0, values * penalty, values / penalty)
    if counts:
        times = Counter(tokens[len(tokens) - num_generated :])
        seen = list(times)
        row_V[seen] -= np.float32(sampling.frequency_penalty) * np.array(list(times.values()), dtype=np.float32)
        row_V[seen] -= np.float32(sampling.presence_penalty)


def draw(row_V: Row, params: SamplingParams, u: float) -> int:
    """The token at quantile `u` in [0, 1) of the distribution that temperature, min_p, top_k and top_p leave.

    row_V: adjusted logits. `INVALID_TOKEN` unless the largest one is finite.
    """
    columns = _Columns([0], [params])
    return columns.draw(_host_ops(), torch.from_numpy(row_V)[None], [u for _ in columns.random])[0]


def token_logprob(row_V: Row, token: int, num_top: int) -> TokenLogprob:
    """The log-softmax of one row at `token`, and its `num_top` largest entries (fewer if others are -inf)."""
    return _logprobs(_host_ops(), torch.from_numpy(row_V)[None], [0], [token], [num_top])[0]


def _host_ops() -> SamplingOps:
    return sampling.select(torch.device("cpu"))


def _logprobs(
    ops: SamplingOps, logits_BV: torch.Tensor, rows: Sequence[int], ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprob]:
    """The log-probability of an id, and the largest ones, for each of the rows."""
    num_top = [min(count, logits_BV.shape[1]) for count in num_top]
    found, top_ids, top_values = ops.logprobs(logits_BV, _integers(rows), _integers(ids), _integers(num_top))
    tops = zip(top_ids.tolist(), top_values.tolist(), strict=True)
    pairs = [tuple((j, value) for j, value in zip(*top, strict=True) if j >= 0) for top in tops]
    return [
        TokenLogprob(id=id, logprob=value, top=top) for id, value, top in zip(ids, found.tolist(), pairs, strict=True)
    ]


def _integers(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _floats(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)
