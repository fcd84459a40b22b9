"""The tokenizer of random models: a token per byte, and ChatML."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from parallel.model.tokenizer import Tokenizer, TokenizerFacts, byte_alphabet

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 256, 257 and 258, after the bytes."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, then `SPECIAL`; answers end with <|im_end|>."""
    vocabulary = {char: byte for byte, char in enumerate(byte_alphabet())}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    facts = TokenizerFacts(eos="<|im_end|>", pad="<|endoftext|>", template=CHATML)
    return Tokenizer(backend, facts)
