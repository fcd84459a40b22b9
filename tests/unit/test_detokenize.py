"""Text from tokens while they come: exact whatever the cuts, stop strings across tokens, linear work."""

import random
import time

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from parallel.model.tokenizer import Tokenizer, TokenizerFacts, byte_alphabet
from parallel.model.tokenizer_bytes import byte_tokenizer
from serve.detokenize import Detokenizer, StopString, escaped, printable

TEXTS = (
    "plain words, and more of them",
    "\u20ac \u00e9t\u00e9 \u4e2d\u6587 \u0416",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 family \U0001f1e9\U0001f1ea",
    "\n\n\ttabs\x00and control\x7f",
)


def merged_tokenizer() -> Tokenizer:
    """Byte-level BPE whose tokens cut characters at odd places: random pairs of bytes of the texts."""
    alphabet = byte_alphabet()
    vocabulary = {char: byte for byte, char in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    rng = random.Random(0)
    stream = "".join(alphabet[byte] for text in TEXTS for byte in text.encode())
    while len(merges) < 60:
        start = rng.randrange(len(stream) - 1)
        pair = (stream[start], stream[start + 1])
        if pair[0] + pair[1] not in vocabulary:
            vocabulary[pair[0] + pair[1]] = len(vocabulary)
            merges.append(pair)
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    return Tokenizer(backend, TokenizerFacts(eos="<end>"))


def pieces_of(detokenizer: Detokenizer, ids) -> list[str]:
    """What each token releases, and the rest at the end; stops at a stop string."""
    pieces = []
    for id in ids:
        pieces.append(detokenizer.push(id))
        if detokenizer.stopped is not None:
            return pieces
    return [*pieces, detokenizer.finish()]


@pytest.mark.parametrize("make", [byte_tokenizer, merged_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_characters_appear_whole_and_only_with_their_last_byte(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text)
    pieces = pieces_of(Detokenizer(tokenizer), ids)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    for end in range(len(ids) + 1):
        known = b"".join(tokenizer.token_bytes(id) for id in ids[:end]).decode("utf-8", "ignore")
        assert "".join(pieces[:end]) == known


@pytest.mark.parametrize("make", [byte_tokenizer, merged_tokenizer])
@pytest.mark.parametrize("skip_special", [True, False])
def test_random_ids_give_the_decoding_of_all_of_them_at_once(make, skip_special):
    tokenizer, rng = make(), random.Random(1)
    for length in (0, 1, 2, 3, 5, 40, 400):
        for _ in range(30):
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(length)]
            pieces = pieces_of(Detokenizer(tokenizer, skip_special=skip_special), ids)
            assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip_special)


def test_half_a_character_at_the_end_becomes_a_replacement_character_and_never_before():
    tokenizer = byte_tokenizer()
    ids = list("a\U0001f600".encode())[:-1]
    pieces = pieces_of(Detokenizer(tokenizer), ids)
    assert pieces == ["a", "", "", "", "\ufffd"]
    assert "".join(pieces) == tokenizer.decode(ids)


def test_special_tokens_have_no_text_but_count_as_tokens():
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    assert pieces_of(detokenizer, [*b"a", 257, *b"b", 258]) == ["a", "", "b", "", ""]
    detokenizer.count()
    assert (detokenizer.num_tokens, detokenizer.num_characters) == (5, 2)
    assert pieces_of(Detokenizer(tokenizer, skip_special=False), [258]) == ["<|im_end|>", ""]


def test_text_that_may_begin_a_stop_string_is_held_back():
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer, stop=["END"])
    assert pieces_of(detokenizer, b"a ENx E") == ["a", " ", "", "", "ENx", " ", "", "E"]
    detokenizer = Detokenizer(tokenizer, stop=["END"])
    assert pieces_of(detokenizer, b"a END of it") == ["a", " ", "", "", ""]
    assert detokenizer.stopped == "END"
    assert detokenizer.num_tokens == 5
    assert detokenizer.finish() == ""


def naive(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """The text up to the stop string completed first (the longer of two), by looking at every prefix."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def test_stop_strings_cut_as_the_whole_text_says_whatever_the_tokens():
    tokenizer, rng = merged_tokenizer(), random.Random(2)
    num_stopped = 0
    for trial in range(1500):
        alphabet = "ab" if trial % 2 else "a\u20acb\U0001f600"
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(30)))
        stop = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(1, 4))]
        include = rng.random() < 0.5
        detokenizer = Detokenizer(tokenizer, stop=stop, include_stop=include)
        got = "".join(pieces_of(detokenizer, tokenizer.encode(text)))
        assert (got, detokenizer.stopped) == naive(text, stop, include), (text, stop)
        num_stopped += detokenizer.stopped is not None
    assert 300 < num_stopped < 1400


def test_no_stop_string_counts_before_min_tokens():
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer, stop=["ab"], min_tokens=5)
    assert "".join(pieces_of(detokenizer, b"ababxabyy")) == "ababx"
    assert detokenizer.num_tokens == 7


def test_a_stop_string_that_repeats_itself_is_watched_by_its_borders():
    watcher = StopString("aabaab")
    assert [watcher.advance(c) for c in "aabaaabaab"] == [False] * 9 + [True]


def test_the_work_per_token_stays_the_same_in_a_long_text():
    """A million tokens' worth of re-decoding would take minutes; the tail must cost what the head costs."""
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer, stop=["\n\nUser:", "x" * 500])
    ids = list("\u20ac and x".encode()) * 2000
    for id in ids[:1000]:
        detokenizer.push(id)
    times = []
    for part in range(4):
        start = time.process_time()
        for id in ids[part * 4000 : (part + 1) * 4000]:
            detokenizer.push(id)
        times.append(time.process_time() - start)
    assert min(times[2:]) < 5 * min(times[:2])


def test_the_two_spellings_of_one_token():
    assert printable(b"\xe2\x82") == "\ufffd"
    assert escaped(b"\xe2\x82") == "bytes:\\xe2\\x82"
    assert printable("\u20ac".encode()) == escaped("\u20ac".encode()) == "\u20ac"
