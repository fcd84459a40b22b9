"""What tests of configurations share: two architectures, and a checked training run."""

from conf.check import check
from conf.load import load
from conf.schema import Architecture, Config

TINY = load(["model=tiny"], "train").model.architecture
SMOLLM2 = Architecture(
    num_layers=30, width=576, num_heads=9, num_kv_heads=3, head_dim=64, ffn_width=1536, vocab_size=49152,
    max_positions=8192, tied_embeddings=True,
)  # fmt: skip


def checked(*argv: str, ranks: int | None = 1, architecture: Architecture | None = SMOLLM2) -> Config:
    return check(load(["data.path=rows.jsonl", *argv], "train"), "train", ranks, architecture)
