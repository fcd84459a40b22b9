"""The sampler: masks, penalties, draws, row independence and log-probabilities."""

import math

import numpy as np
import pytest
import torch

from kernels.sampling import FIRST_SORTED
from serve.request import INVALID_TOKEN, Request, SamplingParams
from serve.sampler import Sampler, adjust, draw, is_adjusted, token_logprob, uniform

EOS = frozenset({2, 3})


def logits(num_rows, vocab_size, seed=0, scale=3.0):
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def request(id="r", prompt=(1, 2), **sampling):
    return Request(id=id, prompt=prompt, sampling=SamplingParams(**sampling))


def sample(logits_BV, *requests, output=()):
    return Sampler(EOS).sample(logits_BV, requests, [[*request.prompt, *output] for request in requests])


def tokens_of(logits_V, count, **sampling):
    """The token at each of `count` places of one request's output, the logits staying the same."""
    one = request(ignore_eos=True, **sampling)
    return [sample(logits_V[None], one, output=[5] * index)[0][0] for index in range(count)]


def test_greedy_takes_the_largest_and_of_equals_the_lowest_id():
    logits_BV = logits(3, 1000)
    logits_BV[1, [7, 300, 999]] = 50.0
    logits_BV[2] = 0.25
    requests = [request(str(row), temperature=0) for row in range(3)]
    ids, logprobs = sample(logits_BV, *requests)
    assert ids == [int(logits_BV[0].argmax()), 7, 0]
    assert logprobs == [None] * 3


def test_a_sampler_draws_the_same_whoever_was_there_the_step_before():
    """Requests come, go, stay and change places, some in need of changed logits; each draws as with a new sampler."""
    random, greedy, cold = request("a", seed=3), request("b", temperature=0), request("c", temperature=0.2, top_k=5)
    other, biased = request("a", seed=4), request("d", logit_bias=((7, 3.0),))
    kept, steps = (
        Sampler(EOS),
        [[random, greedy], [random, greedy], [other, greedy], [greedy, random], [biased, random]],
    )
    steps += [[random], [biased], [cold, random, greedy], [cold, greedy], [random, biased, greedy], [greedy, greedy]]
    found = []
    for step, requests in enumerate(steps):
        logits_BV, histories = logits(len(requests), 800, step, scale=0.5), [[1, 2, *[5] * step] for _ in requests]
        found.append(kept.sample(logits_BV, requests, histories)[0])
        assert found[-1] == Sampler(EOS).sample(logits_BV, requests, histories)[0]
    assert all(row[-1] != row[0] for row in found if len(row) > 1), "rows differ"


def test_the_input_stays_as_it_is():
    logits_BV = logits(1, 50)
    before = logits_BV.clone()
    sample(
        logits_BV,
        request(min_tokens=5, repetition_penalty=1.5, presence_penalty=1, logit_bias=((4, 9.0),)),
        output=[5, 6],
    )
    assert torch.equal(logits_BV, before)


def test_min_tokens_keeps_stop_tokens_away_until_then():
    logits_V = torch.zeros(10)
    logits_V[torch.tensor([2, 3, 6])] = torch.tensor([30.0, 20.0, 10.0])
    kwargs = {"temperature": 0.0, "min_tokens": 2, "stop_ids": (6,)}
    found = [sample(logits_V[None], request(**kwargs), output=[5] * count)[0][0] for count in range(4)]
    assert found == [0, 0, 2, 2]
    assert sample(logits_V[None], request(ignore_eos=True, **kwargs))[0] == [2]  # then only stop_ids count
    assert sample(logits_V[None], request(temperature=0, min_tokens=1))[0] == [6]


def test_penalties_by_hand():
    row_V = np.array([2.0, -2.0, 1.0, -1.0, 0.5, 4.0], dtype=np.float32)
    tokens = [0, 1, 3, 5, 5, 5]  # output: 3 5 5 5
    sampling = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((5, 2.0), (2, -1.0))
    )
    assert is_adjusted(sampling, 4)
    adjust(row_V, sampling, tokens, 4, EOS)
    expected = [2 / 2, -2 * 2, 1 - 1, -1 * 2 - 0.25 - 0.5, 0.5, (4 + 2) / 2 - 3 * 0.25 - 0.5]
    assert row_V.tolist() == expected
    for nothing, num_generated in ((SamplingParams(presence_penalty=1), 0), (SamplingParams(), 4)):
        assert not is_adjusted(nothing, num_generated)
        adjust(row_V, nothing, tokens[: 2 + num_generated], num_generated, EOS)
        assert row_V.tolist() == expected


def test_negative_penalties_raise():
    row_V = np.zeros(4, dtype=np.float32)
    adjust(row_V, SamplingParams(presence_penalty=-1, frequency_penalty=-0.5), [0, 1, 1], 2, EOS)
    assert row_V.tolist() == [0, 2, 0, 0]


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        ({5: math.nan}, True),
        ({5: math.inf}, True),
        ({2: math.inf}, True),  # masked by min_tokens, yet no number of this row can be trusted
        ({5: -math.inf}, False),
        (dict.fromkeys(range(8), -math.inf), True),
        (dict.fromkeys((0, 1, 4, 5, 6, 7), -math.inf), True),  # what is left is masked
        ({5: torch.finfo(torch.float32).min}, False),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_only_rows_without_finite_logits_are_refused(change, bad, temperature):
    logits_BV = logits(2, 8)
    for token, value in change.items():
        logits_BV[0, token] = value
    kwargs = {"temperature": temperature, "min_tokens": 4, "repetition_penalty": 2.0, "logprobs": 2}
    ids, logprobs = sample(logits_BV, request("a", **kwargs), request("b", **kwargs), output=[5])
    assert (ids[0] == INVALID_TOKEN) == bad
    assert (logprobs[0] is None) == bad
    assert ids[1] not in EOS
    assert logprobs[1].id == ids[1]


def test_the_token_depends_on_seed_and_place_alone():
    logits_V = logits(1, 5000, scale=1.0)[0]
    first = tokens_of(logits_V, 30, seed=1)
    assert first == tokens_of(logits_V, 30, seed=1)
    assert first != tokens_of(logits_V, 30, seed=2)
    assert len(set(first)) > 20
    assert sample(logits_V[None], request("x"))[0] == sample(logits_V[None], request("x"))[0]
    assert len({sample(logits_V[None], request(str(id)))[0][0] for id in range(20)}) > 10


MIXED = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9, "logprobs": 3},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.3, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 1.0, "logprobs": 0},
    {"temperature": 0.0, "frequency_penalty": 0.5, "logprobs": 20},
    {"temperature": 0.9, "top_k": 100, "top_p": 0.8, "min_p": 0.01, "presence_penalty": 1.0},
    {"temperature": 2.0, "top_p": 0.99, "logit_bias": ((3, 4.0),)},
]


def test_a_row_is_bitwise_the_same_alone_and_in_any_batch():
    logits_BV = logits(32, 4999)  # odd: rows of a batch lie at every alignment
    requests = [request(f"r{row}", **MIXED[row % len(MIXED)]) for row in range(32)]
    together = sample(logits_BV, *requests, output=[7, 8, 7])
    for row in range(32):
        alone = sample(logits_BV[row : row + 1].clone(), requests[row], output=[7, 8, 7])
        assert (alone[0][0], alone[1][0]) == (together[0][row], together[1][row])
    backwards = sample(logits_BV.flip(0), *requests[::-1], output=[7, 8, 7])
    assert (backwards[0][::-1], backwards[1][::-1]) == together


def test_uniform_is_uniform_and_below_one():
    values = np.array([uniform(seed, index) for seed in range(-50, 50) for index in range(200)])
    assert values.min() >= 0
    assert values.max() < 1
    counts, _ = np.histogram(values, bins=50, range=(0, 1))
    assert chi_square(counts, np.full(50, 0.02)) < critical(49)
    by_index = values.reshape(100, 200)
    assert abs(np.corrcoef(by_index[:, :-1].ravel(), by_index[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(by_index[:-1].ravel(), by_index[1:].ravel())[0, 1]) < 0.03


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def critical(freedom):
    """The 99.9% quantile of chi-square, by Wilson and Hilferty."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0.6}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_draws_follow_the_distribution(kwargs):
    logits_V = logits(1, 12, seed=3, scale=1.5)[0]
    sampling = SamplingParams(**kwargs)
    scaled = (logits_V.double() / sampling.temperature).softmax(0)
    order = scaled.argsort(descending=True)
    if sampling.top_k:
        scaled[order[sampling.top_k :]] = 0
    if sampling.top_p < 1:
        scaled[order[1:][scaled[order].cumsum(0)[:-1] >= sampling.top_p]] = 0
    scaled[scaled < sampling.min_p * scaled.max()] = 0
    probabilities = (scaled / scaled.sum()).numpy()
    row_V = logits_V.numpy()
    drawn = [draw(row_V, sampling, uniform(seed, 0)) for seed in range(20000)]
    counts = np.bincount(drawn, minlength=12)
    kept = probabilities > 0
    assert counts[~kept].sum() == 0
    assert chi_square(counts[kept], probabilities[kept]) < critical(kept.sum() - 1)


def test_a_large_vocabulary_is_searched_as_far_as_needed():
    """Flat logits: the draw lies beyond the first sorted prefixes, and where doesn't depend on them."""
    row_V = logits(1, 40 * FIRST_SORTED, scale=0.1)[0].numpy()
    order = np.argsort(-row_V, kind="stable")
    weights = np.exp(row_V[order].astype(np.float64))
    sums = np.cumsum(weights) / weights.sum()
    for u in (0.0, 0.01, 0.1, 0.4, 0.9, 0.99999, 1 - 2**-53):
        expected = min(int(np.searchsorted(sums, u, side="right")), len(order) - 1)
        assert abs(order.tolist().index(draw(row_V, SamplingParams(), u)) - expected) <= (u > 0.99)
        nucleus = int(np.searchsorted(sums, 0.5))
        expected = int(np.searchsorted(sums, u * sums[nucleus], side="right"))
        assert draw(row_V, SamplingParams(top_p=0.5), u) == order[min(expected, nucleus)]


def test_ties_are_drawn_in_order_of_id_whichever_prefix_holds_them():
    row_V = np.zeros(4 * FIRST_SORTED, dtype=np.float32)
    row_V[-1] = 1e-3
    count = len(row_V)
    assert draw(row_V, SamplingParams(), 0.0) == count - 1
    for u in (0.1, 0.25, 0.7, 0.9):
        assert abs(draw(row_V, SamplingParams(), u) - (u * count - 1)) <= 1
    assert draw(row_V, SamplingParams(top_k=2), 1 - 2**-53) == count - 2  # all tied with the second stay


@pytest.mark.parametrize("kwargs", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}, {"temperature": 1e-4}])
def test_filters_at_their_ends_leave_the_largest(kwargs):
    row_V = logits(1, 3000)[0].numpy()
    for u in (0.0, 0.5, 1 - 2**-53):
        assert draw(row_V, SamplingParams(**kwargs), u) == int(row_V.argmax())


def test_intervals_are_closed_below_and_a_nucleus_ends_where_it_reaches_top_p():
    row_V = np.zeros(4, dtype=np.float32)
    assert [draw(row_V, SamplingParams(), u) for u in (0.0, 0.24, 0.25, 0.5, 0.75)] == [0, 0, 1, 2, 3]
    assert [draw(row_V, SamplingParams(top_p=0.5), u) for u in (0.0, 0.49, 0.5, 1 - 2**-53)] == [0, 0, 1, 1]


def test_filters_that_are_off_change_nothing():
    row_V = logits(1, 300)[0].numpy()
    for u in np.linspace(0, 0.999, 50):
        plain = draw(row_V, SamplingParams(), u)
        for kwargs in ({"top_k": -1}, {"top_k": 300}, {"top_k": 10**6}, {"top_p": 1.0}, {"min_p": 0.0}):
            assert draw(row_V, SamplingParams(**kwargs), u) == plain


def test_a_token_without_probability_is_never_drawn():
    row_V = np.full(2000, -np.inf, dtype=np.float32)
    row_V[[5, 1500]] = 1.0
    drawn = {draw(row_V, SamplingParams(temperature=3.0), u) for u in (0.0, 0.49, 0.51, 1 - 2**-53)}
    assert drawn == {5, 1500}


def test_logprobs_are_of_the_unmodified_distribution():
    logits_BV = logits(2, 3000)
    requests = [
        request("a", temperature=0.3, top_k=2, repetition_penalty=2.0, logprobs=4),
        request("b", temperature=0, logit_bias=((77, 100.0),), logprobs=0),
    ]
    ids, logprobs = sample(logits_BV, *requests)
    exact = logits_BV.double().log_softmax(-1)
    top = exact[0].topk(4)
    assert ids[1] == 77
    assert [entry.id for entry in logprobs] == ids
    for row in range(2):
        assert logprobs[row].logprob == pytest.approx(float(exact[row, ids[row]]), abs=1e-6)
    assert [id for id, _ in logprobs[0].top] == top.indices.tolist()
    assert [value for _, value in logprobs[0].top] == pytest.approx(top.values.tolist(), abs=1e-6)
    assert logprobs[1].top == ()


def test_top_logprobs_break_ties_by_id_and_leave_out_the_impossible():
    row_V = np.array([0.0, 1.0, -np.inf, 1.0, 1.0], dtype=np.float32)
    assert [id for id, _ in token_logprob(row_V, 0, 2).top] == [1, 3]
    assert [id for id, _ in token_logprob(row_V, 0, 20).top] == [1, 3, 4, 0]


def test_other_dtypes_and_lengths_are_our_own_mistakes():
    with pytest.raises(AssertionError, match="bfloat16"):
        sample(logits(1, 5).bfloat16(), request())
    with pytest.raises(AssertionError, match="2"):
        Sampler(EOS).sample(logits(2, 5), [request()], [[1, 2]])
