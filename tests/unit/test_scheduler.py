"""Single decisions of the scheduler, each in a case small enough to follow by hand (pages of 4)."""

import pytest

from serve.blocks import PagePool
from serve.request import INVALID_TOKEN, Request, SamplingParams
from serve.scheduler import Limits, Scheduler

EOS = 0


def scheduler(*, num_pages=100, page_size=4, eos_ids=frozenset({EOS}), **limits):
    bounds = {"max_length": 1000, "max_batch_tokens": 64, "max_sequences": 8, "vocab_size": 100} | limits
    return Scheduler(Limits(**bounds), PagePool(num_pages, page_size), eos_ids)


def request(id, length=3, *, adapter=None, **sampling):
    return Request(id=id, prompt=tuple(range(1, length + 1)), adapter=adapter, sampling=SamplingParams(**sampling))


def step(subject, token=50):
    """A step in which every sampling request gets `token`: (id, start, length) of its chunks, the outputs."""
    plan = subject.schedule()
    subject.check()
    outputs = subject.update(plan, {chunk.id: token for chunk in plan.chunks if chunk.samples})
    subject.check()
    return [(chunk.id, chunk.start, chunk.length) for chunk in plan.chunks], outputs


def finishes(outputs):
    return {output.id: output.finish for output in outputs}


def test_a_prompt_runs_in_chunks_then_token_by_token():
    subject = scheduler(max_chunk=3)
    subject.add(request("a", 7, max_tokens=2))
    assert step(subject)[0] == [("a", 0, 3)]
    chunks, outputs = step(subject)
    assert (chunks, outputs) == ([("a", 3, 3)], [])
    chunks, outputs = step(subject, token=51)
    assert chunks == [("a", 6, 1)]
    assert (outputs[0].tokens, outputs[0].finish) == ((51,), None)
    plan = subject.schedule()
    assert plan.chunks[0].tokens == (51,)
    assert (plan.chunks[0].start, plan.chunks[0].end, plan.chunks[0].pages) == (7, 8, (0, 1))
    outputs = subject.update(plan, {"a": 52})
    assert (outputs[0].tokens, outputs[0].finish) == ((52,), "length")
    assert not subject.has_work
    assert subject.stats()["free_pages"] == 100


def test_the_token_budget_is_shared_oldest_first():
    subject = scheduler(max_batch_tokens=10)
    subject.add(request("a", 4))
    step(subject)
    subject.add(request("b", 12))
    subject.add(request("c", 5))
    assert step(subject)[0] == [("a", 4, 1), ("b", 0, 9)]
    assert step(subject)[0] == [("a", 5, 1), ("b", 9, 3), ("c", 0, 5)]
    assert step(subject)[0] == [("a", 6, 1), ("b", 12, 1), ("c", 5, 1)]


def test_max_sequences_holds_and_nobody_is_overtaken():
    subject = scheduler(max_sequences=2)
    for id in "abc":
        subject.add(request(id, max_tokens=2))
    assert [id for id, _, _ in step(subject)[0]] == ["a", "b"]
    assert subject.stats()["waiting"] == 1
    step(subject)
    assert step(subject)[0] == [("c", 0, 3)]


def test_admission_leaves_all_what_they_need_plus_two_pages():
    for num_pages, entered in [(8, "a"), (9, "ab"), (11, "ab"), (12, "abc")]:
        subject = scheduler(num_pages=num_pages, max_chunk=4)
        subject.add(request("a", 12))  # needs 3 pages + 2
        subject.add(request("b", 8))  # 2 + 2
        subject.add(request("c", 1))  # 1 + 2
        assert [id for id, _, _ in step(subject)[0]] == list(entered)
        assert subject.stats() == {
            "running": len(entered),
            "waiting": 3 - len(entered),
            "free_pages": num_pages - len(entered),  # only chunks have pages
            "num_pages": num_pages,
            "preemptions": 0,
        }


def test_the_newest_is_preempted_and_comes_back_first_with_its_tokens():
    subject = scheduler(num_pages=6)
    for id in "abc":
        subject.add(request(id, 4, max_tokens=12))
    for _ in range(9):
        assert [id for id, _, _ in step(subject, token=60)[0]] == ["a", "b"]
    plan = subject.schedule()  # both have 12 tokens computed and 3 pages, no page is free
    assert plan.preempted == ("b",)
    assert [(chunk.id, chunk.start) for chunk in plan.chunks] == [("a", 12)]
    subject.update(plan, {"a": 60})
    assert subject.stats()["preemptions"] == 1
    assert [id for id, _, _ in step(subject, token=60)[0]] == ["a"]
    assert finishes(step(subject, token=60)[1]) == {"a": "length"}
    chunks, outputs = step(subject, token=61)
    assert chunks == [("b", 0, 13)]  # prompt and the nine tokens it had, at once; before c
    assert outputs[0].tokens == (61,)
    subject.schedule()
    assert [list(tokens) for tokens in subject.sampling()[1]] == [[1, 2, 3, 4, *[60] * 9, 61]]


def test_the_sampler_is_told_of_the_chunks_that_reach_the_end_of_their_tokens():
    subject = scheduler(max_chunk=4)
    requests = [request("a", 2, adapter="z"), request("b", 5), request("c", 3)]
    for one in requests:
        subject.add(one)
    subject.schedule()  # c and a: the base first
    assert subject.sampling() == ([requests[2], requests[0]], [[1, 2, 3], [1, 2]])


def test_a_chunk_shrinks_to_the_free_pages_then_waits_then_yields():
    subject = scheduler(num_pages=11, max_batch_tokens=16)
    subject.add(request("a", 2))
    subject.add(request("b", 23))
    assert step(subject)[0] == [("a", 0, 2), ("b", 0, 14)]
    subject._pool.allocate(5)  # the prefix of an adapter loaded meanwhile; one page is left
    assert step(subject)[0] == [("a", 2, 1), ("b", 14, 6)]  # b wanted 9
    assert step(subject)[0] == [("a", 3, 1)]  # b waits with its five pages
    assert subject.stats()["preemptions"] == 0
    plan = subject.schedule()  # a needs its second page
    assert (plan.preempted, [(chunk.id, chunk.start) for chunk in plan.chunks]) == (("b",), [("a", 4)])
    subject.update(plan, {"a": EOS})
    assert step(subject)[0] == [("b", 0, 16)]


def test_the_newest_goes_on_once_an_older_one_has_ended():
    subject = scheduler(num_pages=6)
    subject.add(request("a", 2, max_tokens=2))
    subject.add(request("b", 4, max_tokens=9))
    assert step(subject)[0] == [("a", 0, 2), ("b", 0, 4)]
    subject._pool.allocate(4)
    assert step(subject)[0] == [("a", 2, 1)]
    assert step(subject)[0] == [("b", 4, 1)]
    assert subject.stats()["preemptions"] == 0


def test_a_request_that_can_never_run_is_refused_at_once():
    subject = scheduler(num_pages=3, max_length=20)
    assert subject.add(request("a", 11)) is None
    refused = subject.add(request("b", 12))
    assert refused.finish == "error"
    assert refused.error == "prompt=12 tokens don't fit in the 12 of the KV cache; shorten it or raise serve.kv_memory"
    refused = subject.add(request("c", 20))
    assert refused.error == "prompt=20 tokens leave no room for an answer in max_length=20; shorten it"
    refused = subject.add(Request(id="d", prompt=(100,)))
    assert refused.error == "prompt=100 is not a token: ids end below vocab_size=100"
    assert [subject.cancel(id) for id in "bcd"] == [None, None, None]
    with pytest.raises(ValueError, match="request 'a' is still running"):
        subject.add(request("a"))


def test_length_ends_at_the_context_or_the_whole_cache():
    subject = scheduler(max_length=6)
    subject.add(request("a", 4))
    step(subject)
    assert finishes(step(subject)[1]) == {"a": "length"}
    subject = scheduler(num_pages=2)
    subject._pool.allocate(1)  # an adapter's prefix
    subject.add(request("a", 2))
    step(subject)
    assert finishes(step(subject)[1]) == {"a": "length"}


def test_stop_tokens():
    subject = scheduler(max_sequences=4)
    subject.add(request("eos", max_tokens=9))
    subject.add(request("ignores", max_tokens=2, ignore_eos=True))
    subject.add(request("later", max_tokens=9, min_tokens=1))
    subject.add(request("own", max_tokens=9, ignore_eos=True, stop_ids=(7, EOS)))
    assert finishes(step(subject, token=EOS)[1]) == {
        "eos": "stop",
        "ignores": None,
        "later": None,
        "own": "stop",
    }
    outputs = step(subject, token=EOS)[1]
    assert finishes(outputs) == {"ignores": "length", "later": "stop"}
    assert {output.tokens for output in outputs} == {(EOS,)}


def test_stop_wins_over_length():
    subject = scheduler()
    subject.add(request("a", max_tokens=1))
    assert finishes(step(subject, token=EOS)[1]) == {"a": "stop"}


def test_logits_that_are_not_finite_end_only_that_request():
    subject = scheduler()
    subject.add(request("a"))
    subject.add(request("b"))
    plan = subject.schedule()
    outputs = subject.update(plan, {"a": INVALID_TOKEN, "b": 5})
    assert finishes(outputs) == {"a": "error", "b": None}
    assert outputs[0].tokens == ()
    assert outputs[0].error == "the model's logits for this request are not finite"
    assert step(subject)[0] == [("b", 3, 1)]


def test_cancel_waiting_running_and_in_flight():
    subject = scheduler(max_sequences=2, num_pages=10)
    for id in "abc":
        subject.add(request(id, 4))
    assert subject.cancel("nobody") is None
    plan = subject.schedule()
    assert subject.cancel("a").finish == "abort"
    assert subject.cancel("c").finish == "abort"
    assert subject.add(request("a", 2)) is None  # the same id again: the old chunk must not count for it
    outputs = subject.update(plan, {"a": 5, "b": 5})
    assert finishes(outputs) == {"b": None}
    subject.check()
    assert step(subject)[0] == [("b", 4, 1), ("a", 0, 2)]
    subject.cancel("b")
    subject.cancel("a")
    assert not subject.has_work
    assert subject.stats()["free_pages"] == 10


def test_chunks_of_one_adapter_are_adjacent_by_age():
    subject = scheduler()
    for id, adapter in [("a", "y"), ("b", None), ("c", "x"), ("d", "y"), ("e", None), ("f", "x")]:
        subject.add(request(id, adapter=adapter))
    plan = subject.schedule()
    assert [(chunk.id, chunk.adapter) for chunk in plan.chunks] == [
        ("b", None), ("e", None), ("c", "x"), ("f", "x"), ("a", "y"), ("d", "y")
    ]  # fmt: skip
    subject.update(plan, {chunk.id: EOS if chunk.adapter == "x" else 5 for chunk in plan.chunks})
    assert subject.uses("y")
    assert not subject.uses("x")
    assert not subject.uses("z")


def test_pages_pinned_later_end_a_request_that_no_longer_fits_with_an_error():
    subject = scheduler(num_pages=4, max_chunk=4)
    subject.add(request("a", 12))
    step(subject)
    subject.add(request("b", 9))
    subject._pool.allocate(3)
    chunks, outputs = step(subject)
    assert chunks == [("b", 0, 4)]
    assert finishes(outputs) == {"a": "error"}
    assert outputs[0].error == "no KV page left: 3 of 4 are pinned by adapters"
    plan = subject.schedule()
    assert (plan.chunks, subject.has_work) == ((), True)
    assert finishes(subject.update(plan, {})) == {"b": "error"}
    assert not subject.has_work


def test_every_plan_is_answered_once():
    subject = scheduler()
    subject.add(request("a"))
    plan = subject.schedule()
    with pytest.raises(AssertionError, match=r"schedule\(\) again before update\(\)"):
        subject.schedule()
    with pytest.raises(AssertionError, match="not the plan of the last"):
        subject.update(type(plan)(chunks=(), preempted=()), {})
    subject.update(plan, {"a": 5})
    with pytest.raises(AssertionError, match="not the plan of the last"):
        subject.update(plan, {"a": 5})


def test_nothing_to_do_is_an_empty_plan():
    subject = scheduler()
    assert not subject.has_work
    assert step(subject) == ([], [])


def test_limits_are_positive():
    with pytest.raises(ValueError, match="max_chunk=0 must be at least 1"):
        Limits(max_length=1, max_batch_tokens=1, max_sequences=1, vocab_size=1, max_chunk=0)


def test_the_digest_sees_everything_that_decides():
    def fresh():
        subject = scheduler()
        subject.add(request("a", max_tokens=5))
        return subject

    one, other = fresh(), fresh()
    assert one.state_digest() == other.state_digest()
    plan, same = one.schedule(), other.schedule()
    assert plan == same
    assert one.state_digest() == other.state_digest()
    one.update(plan, {"a": 5})
    other.update(same, {"a": 6})
    assert one.state_digest() != other.state_digest()
    one, other = fresh(), fresh()
    other.add(request("b"))
    other.cancel("b")
    assert one.state_digest() != other.state_digest()  # the next arrival will have another number
