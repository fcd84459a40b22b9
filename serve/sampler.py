"""Chooses each request's next token from its logits.

Order of operations, as in vLLM and transformers:

    logits -> min_tokens mask, logit_bias -> repetition, then frequency and presence penalty
           -> greedy: argmax, ties to the lowest id
           -> else:   / temperature -> min_p -> top_k -> top_p -> one draw

A draw is the inverse CDF of what is left, sorted by falling logit (ties by rising id), at one uniform number
that is a hash of (request seed, index of the token in the output). So there is no generator state: a request
gets the same tokens in any batch, after preemption, and on any rank.

Rows are worked on one by one in host memory with numpy: whatever a row's neighbours ask for, exactly the same
operations run on its V values, so its result can't depend on them; and numpy's argmax and partition on a CPU
are several times faster than torch's max and topk. A full sort (about 4 ms for V=49152) is avoided: a row
is sorted only as far down as its draw needs.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from serve.request import INVALID_TOKEN, Request, SamplingParams, TokenLogprob

Row = NDArray[np.float32]

FIRST_SORTED = 512
"""How many of the largest logits are sorted at first; each further attempt sorts 16 times as many."""


class Sampler:
    """Samples one token per row. Holds no state but the ids that end a text."""

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self._eos_ids = eos_ids

    def sample(
        self, logits_BV: torch.Tensor, requests: Sequence[Request], histories: Sequence[Sequence[int]]
    ) -> tuple[list[int], list[TokenLogprob | None]]:
        """The next token of each row, and its log-probabilities where the request asked for them.

        logits_BV: [B, V] float32 on any device, not changed. histories: known tokens of each request, prompt
        then output. A row with a nan or +inf, or with nothing but -inf left to choose from, gets
        `INVALID_TOKEN` and no log-probabilities. These are of the logits as given, before any adjustment.
        """
        assert logits_BV.dtype == torch.float32, logits_BV.dtype
        assert len(logits_BV) == len(requests) == len(histories), (
            logits_BV.shape,
            len(requests),
            len(histories),
        )
        ids: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        rows: Row = logits_BV.detach().cpu().numpy()
        for row_V, request, tokens in zip(rows, requests, histories, strict=True):
            token = self._next(row_V, request, tokens)
            num_top = request.sampling.logprobs
            ids.append(token)
            if num_top is None or token == INVALID_TOKEN:
                logprobs.append(None)
            else:
                logprobs.append(token_logprob(row_V, token, num_top))
        return ids, logprobs

    def _next(self, row_V: Row, request: Request, tokens: Sequence[int]) -> int:
        if not math.isfinite(row_V.max()):  # numpy's max is nan if any element is
            return INVALID_TOKEN
        sampling = request.sampling
        num_generated = len(tokens) - len(request.prompt)
        adjusted_V = adjust(row_V, sampling, tokens, num_generated, self._eos_ids)
        best = int(adjusted_V.argmax())  # the first of equals
        if not math.isfinite(adjusted_V[best]):
            return INVALID_TOKEN
        if sampling.is_greedy:
            return best
        return draw(adjusted_V, sampling, uniform(request.seed, num_generated))


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) of 53 random bits: a hash of a request's seed and a token's index in the output."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def adjust(
    row_V: Row, sampling: SamplingParams, tokens: Sequence[int], num_generated: int, eos_ids: frozenset[int]
) -> Row:
    """The logits after mask, bias and penalties: `row_V` itself if nothing applies, else a changed copy.

    tokens: prompt then output; the last `num_generated` are output.
    """
    masks = num_generated < sampling.min_tokens
    repeats = sampling.repetition_penalty != 1
    counts = bool(num_generated and (sampling.presence_penalty or sampling.frequency_penalty))
    if not (masks or repeats or counts or sampling.logit_bias):
        return row_V
    row_V = row_V.copy()
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
    return row_V


def draw(row_V: Row, sampling: SamplingParams, u: float) -> int:
    """The token at quantile `u` in [0, 1) of the distribution that temperature, min_p, top_k and top_p leave.

    row_V: adjusted logits, the largest one finite. Probabilities are kept as weights relative to the largest,
    in float64: w = exp((logit - largest) / temperature).
    """
    total: float | None = None
    for ids, values, is_all in _sorted_prefixes(row_V, sampling):
        weights = np.exp((values.astype(np.float64) - np.float64(values[0])) / sampling.temperature)
        sums = np.cumsum(weights)
        if is_all:
            total = float(sums[-1])
        elif total is None:
            total = _total_weight(row_V, float(values[0]), sampling.temperature)
        last = int(np.searchsorted(sums, sampling.top_p * total))  # where the mass reaches top_p
        if last < len(sums):
            mass = float(sums[last])
        elif sampling.top_p == 1:
            mass = total
        else:
            continue
        chosen = int(np.searchsorted(sums, u * mass, side="right"))
        if chosen < len(sums):
            return int(ids[chosen])
    raise AssertionError("the last prefix holds everything")


def token_logprob(row_V: Row, token: int, num_top: int) -> TokenLogprob:
    """The log-softmax of one row at `token`, and its `num_top` largest entries (fewer if others are -inf)."""
    largest = float(row_V.max())
    norm = largest + math.log(_total_weight(row_V, largest, 1.0))
    top: list[tuple[int, float]] = []
    if num_top:
        ids, values = _sorted_from(row_V, _kth_largest(row_V, num_top))
        pairs = zip(ids[:num_top].tolist(), values[:num_top].tolist(), strict=True)
        top = [(id, value - norm) for id, value in pairs if value > -math.inf]
    return TokenLogprob(id=token, logprob=float(row_V[token]) - norm, top=tuple(top))


def _sorted_prefixes(row_V: Row, sampling: SamplingParams) -> Iterator[tuple[NDArray[np.int64], Row, bool]]:
    """Ever longer prefixes (ids, logits) of the sorted row under min_p and top_k, and whether each is all.

    A prefix holds either all or none of the tokens with equal logits, so which tokens precede another one
    doesn't depend on where a prefix ends.
    """
    floor = -math.inf
    if sampling.min_p:
        floor = float(row_V.max()) + sampling.temperature * math.log(sampling.min_p)
    if sampling.top_k > 0:
        floor = max(floor, _kth_largest(row_V, sampling.top_k))
    count = FIRST_SORTED
    while floor == -math.inf and count < len(row_V):
        ids, values = _sorted_from(row_V, _kth_largest(row_V, count))
        yield ids, values, False
        count *= 16
    ids, values = _sorted_from(row_V, floor)
    yield ids, values, True


def _kth_largest(row_V: Row, k: int) -> float:
    k = min(k, len(row_V))
    return float(np.partition(row_V, len(row_V) - k)[len(row_V) - k])


def _sorted_from(row_V: Row, floor: float) -> tuple[NDArray[np.int64], Row]:
    """Ids and logits of all tokens with logits >= floor, by falling logit, ties by rising id."""
    ids = np.flatnonzero(row_V >= np.float32(floor))
    ids = ids[np.argsort(-row_V[ids], kind="stable")]
    return ids, row_V[ids]


def _total_weight(row_V: Row, largest: float, temperature: float) -> float:
    """Sum over the row of exp((logit - largest) / temperature), added up in float64."""
    with np.errstate(over="ignore"):  # logits masked by float32's lowest value
        weights_V = np.exp((row_V - np.float32(largest)) * np.float32(1 / temperature))
    return float(weights_V.sum(dtype=np.float64))
