"""Random walks over the scheduler with a model that really reads the pages.

The model writes each token of a chunk into the slots of its pages. To sample, it reads the whole history back
through the block table and hashes it. So a page given to two requests, or a position never computed or put
into the wrong slot, changes the tokens, which are compared with a plain loop that knows no pages.
"""

import hashlib
import itertools
import random

import pytest

from serve.blocks import PagePool
from serve.request import Request, SamplingParams
from serve.scheduler import Limits, Scheduler

VOCAB = 30
EOS = frozenset({0, 1})
MAX_LENGTH = 60


def next_token(tokens, adapter):
    digest = hashlib.blake2b(repr((list(tokens), adapter)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VOCAB


def expected(request):
    """(output, finish) of a request by itself."""
    tokens = list(request.prompt)
    sampling = request.sampling
    while True:
        tokens.append(next_token(tokens, request.adapter))
        count = len(tokens) - len(request.prompt)
        stops = tokens[-1] in sampling.stop_ids or (tokens[-1] in EOS and not sampling.ignore_eos)
        if stops and count > sampling.min_tokens:
            return tokens[len(request.prompt) :], "stop"
        if count == sampling.max_tokens or len(tokens) == MAX_LENGTH:
            return tokens[len(request.prompt) :], "length"


def random_request(rng, id):
    return Request(
        id=id,
        prompt=tuple(rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 5, 17, 40]))),
        adapter=rng.choice([None, None, "x", "y"]),
        sampling=SamplingParams(
            max_tokens=rng.choice([None, 1, 3, 20, 30]),
            ignore_eos=rng.random() < 0.5,
            min_tokens=0 if rng.random() < 0.7 else 1,
            stop_ids=rng.choice([(), (5,), (6, 7)]),
        ),
    )


class Walk:
    """A scheduler, a model with physical pages, and the checks of every step."""

    def __init__(self, limits, num_pages, page_size, num_pinned=0):
        self.limits = limits
        self.pool = PagePool(num_pages + num_pinned, page_size)
        self.pinned = self.pool.allocate(num_pinned)
        self.scheduler = Scheduler(limits, self.pool, EOS)
        self.slots = [None] * (self.pool.num_pages * page_size)
        self.requests = {}
        self.computed = {}  # of the live requests
        self.tables = {}
        self.outputs = {}
        self.finish = {}
        self.first_seen = []

    def add(self, request):
        assert self.scheduler.add(request) is None
        self.requests[request.id] = request
        self.computed[request.id] = 0
        self.outputs[request.id] = []

    def cancel(self, id):
        output = self.scheduler.cancel(id)
        assert (output is None) == (id in self.finish)
        if output:
            self.finish[id] = output.finish
        self.scheduler.check()

    def step(self, cancel=None):
        plan = self.scheduler.schedule()
        self.scheduler.check()
        self.check(plan)
        sampled = {chunk.id: self.run(chunk) for chunk in plan.chunks}
        if cancel is not None:  # while the model runs
            self.cancel(cancel)
        live = [chunk.id for chunk in plan.chunks if chunk.samples and chunk.id not in self.finish]
        outputs = self.scheduler.update(plan, {id: token for id, token in sampled.items() if token is not None})
        assert [output.id for output in outputs] == live
        for output in outputs:
            self.outputs[output.id].extend(output.tokens)
            if output.finish:
                self.finish[output.id] = output.finish
        self.scheduler.check()
        assert self.scheduler.has_work == (len(self.finish) < len(self.requests))

    def check(self, plan):
        limits = self.limits
        assert plan.num_tokens <= limits.max_batch_tokens
        assert len(plan.chunks) <= limits.max_sequences
        assert plan.chunks or len(self.finish) == len(self.requests), "a step without progress"
        for id in plan.preempted:
            self.computed[id] = 0
            self.tables.pop(id)
        ids = [chunk.id for chunk in plan.chunks]
        assert len(set(ids)) == len(ids)
        assert not set(ids) & (set(plan.preempted) | set(self.finish))
        groups = [adapter for adapter, _ in itertools.groupby(chunk.adapter for chunk in plan.chunks)]
        assert len(set(groups)) == len(groups), "an adapter's chunks are apart"
        for chunk in plan.chunks:
            request = self.requests[chunk.id]
            known = (*request.prompt, *self.outputs[chunk.id])
            assert 1 <= chunk.length <= (limits.max_chunk or limits.max_batch_tokens)
            assert chunk.start == self.computed[chunk.id], "a position skipped, or computed twice"
            assert chunk.tokens == known[chunk.start : chunk.end]
            assert chunk.samples == (chunk.end == len(known))
            assert chunk.adapter == request.adapter
            assert len(chunk.pages) == self.pool.pages_for(chunk.end)
            before = self.tables.get(chunk.id, ())
            assert chunk.pages[: len(before)] == before, "a page was moved"
            self.tables[chunk.id] = chunk.pages
            self.computed[chunk.id] = chunk.end
        self.first_seen += [id for id in sorted(ids, key=list(self.requests).index) if id not in self.first_seen]
        held = [page for id, pages in self.tables.items() if id not in self.finish for page in pages]
        assert len(set(held)) == len(held)
        assert not set(held) & set(self.pinned)

    def run(self, chunk):
        size = self.pool.page_size

        def slot(position):
            return chunk.pages[position // size] * size + position % size

        for position, token in enumerate(chunk.tokens, chunk.start):
            self.slots[slot(position)] = token
        if not chunk.samples:
            return None
        return next_token([self.slots[slot(position)] for position in range(chunk.end)], chunk.adapter)

    def finished_as_expected(self):
        assert not self.scheduler.has_work
        for id, request in self.requests.items():
            output, finish = expected(request)
            if self.finish[id] == "abort":
                assert self.outputs[id] == output[: len(self.outputs[id])]
            else:
                assert (self.outputs[id], self.finish[id]) == (output, finish)
        self.pool.check([self.pinned])
        assert self.scheduler.stats()["free_pages"] == self.pool.num_pages - len(self.pinned)


def limits(max_chunk=None, max_batch_tokens=32, max_sequences=6):
    return Limits(
        max_length=MAX_LENGTH,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        vocab_size=VOCAB,
        max_chunk=max_chunk,
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_walk_with_arrivals_and_cancels(seed):
    rng = random.Random(seed)
    page_size = rng.choice([1, 3, 4, 16])
    fits_one = -(-MAX_LENGTH // page_size)
    bounds = limits(
        max_chunk=rng.choice([None, 1, 2, 7]),
        max_batch_tokens=rng.choice([1, 5, 32, 200]),
        max_sequences=rng.choice([1, 3, 8]),
    )
    walk = Walk(bounds, fits_one + rng.choice([0, 1, fits_one, 5 * fits_one]), page_size, rng.choice([0, 3]))
    for _ in range(400):
        if rng.random() < 0.15:
            walk.add(random_request(rng, f"r{len(walk.requests)}"))
        if walk.requests and rng.random() < 0.03:
            walk.cancel(rng.choice(list(walk.requests)))
        cancel = rng.choice(list(walk.requests)) if walk.requests and rng.random() < 0.02 else None
        walk.step(cancel)
    most = sum(MAX_LENGTH for id in walk.requests if id not in walk.finish)
    for _ in range(most * MAX_LENGTH):
        if not walk.scheduler.has_work:
            break
        walk.step()
    walk.finished_as_expected()
    admitted = [id for id in walk.requests if id in walk.first_seen]
    assert walk.first_seen == admitted, "a request was overtaken"


@pytest.mark.parametrize("seed", range(3))
def test_outputs_depend_on_neither_chunk_nor_pool_nor_batch(seed):
    rng = random.Random(100 + seed)
    requests = [random_request(rng, f"r{index}") for index in range(16)]
    preemptions = {}
    for max_chunk, num_pages, max_batch_tokens in itertools.product([1, 7, 512], [30, 31, 45, 800], [3, 64]):
        walk = Walk(limits(max_chunk, max_batch_tokens), num_pages, 2)
        for request in requests:
            walk.add(request)
        while walk.scheduler.has_work:
            walk.step()
        walk.finished_as_expected()
        preemptions[num_pages] = preemptions.get(num_pages, 0) + walk.scheduler.stats()["preemptions"]
    assert preemptions[30] + preemptions[31] > 0
    assert preemptions[800] == 0


def test_every_request_ends_under_constant_pressure():
    """Requests arrive faster than they are served, in a pool that holds little more than one of them."""
    walk = Walk(limits(max_batch_tokens=8), 31, 2)
    rng = random.Random(7)
    added_at = {}
    ended_at = {}
    for step in range(1500):
        if step % 4 == 0:
            id = f"r{len(added_at)}"
            added_at[id] = step
            walk.add(random_request(rng, id))
        walk.step()
        for id in walk.finish:
            ended_at.setdefault(id, step)
    assert walk.scheduler.stats()["preemptions"] > 0
    assert walk.scheduler.stats()["waiting"] > 20
    first = [f"r{index}" for index in range(len(ended_at) - 6)]
    assert all(id in ended_at for id in first), "an old request is still there while younger ones ended"


def test_preempted_work_is_not_thrown_away_again_and_again():
    """Under one token is recomputed per four needed, in a pool that holds two and a half full requests."""
    walk = Walk(limits(max_batch_tokens=64), 38, 4)
    for index in range(12):
        sampling = SamplingParams(ignore_eos=True, max_tokens=30)
        walk.add(Request(id=f"r{index}", prompt=(index + 1,) * 25, sampling=sampling))
    computed = 0
    original = walk.run

    def counting(chunk):
        nonlocal computed
        computed += chunk.length
        return original(chunk)

    walk.run = counting
    while walk.scheduler.has_work:
        walk.step()
    walk.finished_as_expected()
    needed = 12 * (25 + 30 - 1)
    assert walk.scheduler.stats()["preemptions"] > 0
    assert needed < computed < needed * 5 / 4


@pytest.mark.parametrize("seed", range(5))
def test_replicas_that_replay_the_same_calls_agree(seed):
    rng = random.Random(200 + seed)
    bounds = limits(max_chunk=5)
    replicas = [Walk(bounds, 20, 4), Walk(bounds, 20, 4)]
    for step in range(200):
        added = random_request(rng, f"r{step}") if rng.random() < 0.3 else None
        cancelled = f"r{rng.randrange(step + 1)}" if rng.random() < 0.05 else None
        for walk in replicas:
            if added:
                walk.add(added)
            if cancelled in walk.requests:
                walk.cancel(cancelled)
            walk.step()
        assert replicas[0].scheduler.state_digest() == replicas[1].scheduler.state_digest()
    assert replicas[0].outputs == replicas[1].outputs
