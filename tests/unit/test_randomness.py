"""Keyed dropout: independent of packing and cuts, with the right rate, and no pattern between neighbours."""

from __future__ import annotations

import torch

from parallel.randomness import DropoutKey, keep_mask, seed_of

KEY = DropoutKey(7, 3, torch.arange(40).repeat_interleave(50), torch.arange(50).repeat(40))


def test_a_cut_of_features_and_tokens_sees_the_same_decisions() -> None:
    whole = keep_mask(KEY, "layer", 0, 96, 0.3)
    assert torch.equal(keep_mask(KEY, "layer", 32, 40, 0.3), whole[:, 32:72])
    some = torch.randperm(2000)[:100]
    part = DropoutKey(7, 3, KEY.row_T[some], KEY.position_T[some])
    assert torch.equal(keep_mask(part, "layer", 0, 96, 0.3), whole[some])


def test_rate_and_independence() -> None:
    keep = keep_mask(KEY, "layer", 0, 128, 0.3).double()
    assert abs(keep.mean() - 0.7) < 0.005
    assert (keep.mean(0) - 0.7).abs().max() < 0.05
    assert (keep.mean(1) - 0.7).abs().max() < 0.2
    centred = keep - keep.mean()
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(50, 0)):
        assert abs((centred * other).mean()) < 0.003


def test_every_part_of_the_key_matters() -> None:
    base = keep_mask(KEY, "layer", 0, 64, 0.5)
    others = [
        keep_mask(DropoutKey(8, 3, KEY.row_T, KEY.position_T), "layer", 0, 64, 0.5),
        keep_mask(DropoutKey(7, 4, KEY.row_T, KEY.position_T), "layer", 0, 64, 0.5),
        keep_mask(DropoutKey(7, 3, KEY.row_T + 1, KEY.position_T), "layer", 0, 64, 0.5),
        keep_mask(DropoutKey(7, 3, KEY.row_T, KEY.position_T + 1), "layer", 0, 64, 0.5),
        keep_mask(KEY, "other", 0, 64, 0.5),
        keep_mask(KEY, "layer", 1, 64, 0.5),
    ]
    for other in others:
        assert abs((base == other).double().mean() - 0.5) < 0.02


def test_no_dropout_keeps_everything() -> None:
    assert keep_mask(KEY, "layer", 0, 64, 0.0).all()


def test_seeds_depend_on_seed_and_name() -> None:
    assert len({seed_of(seed, name) for seed in range(10) for name in "abcdefgh"}) == 80
    assert all(0 <= seed_of(seed, "x") < 2**63 for seed in range(100))
