"""bfloat16 is rounded as torch rounds it, on every path of the compiled kernels: subnormals, ties, infinities, NaN."""

import torch

from tests.backends import backend


def test_every_bfloat16_and_ties_of_sums():
    """x + delta for every x and deltas of half a unit, a quarter, nothing: by whole vectors and by the rest of a row."""
    ops = backend("compiled", torch.bfloat16)
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for shift in (0.0, 2.0**-8, 2.0**-9, -(2.0**-8), 1.0):
        delta = (x.float() * shift).bfloat16()
        expected = x + delta
        for width in (64, 13):
            count = len(x) // width * width
            sums, _ = ops.add_rms_norm(
                x[:count].view(-1, width), delta[:count].view(-1, width), torch.ones(width).bfloat16(), 1e-5
            )
            wanted = expected[:count].view(-1, width)
            assert torch.equal(sums.isnan(), wanted.isnan())
            assert torch.equal(sums.nan_to_num().view(torch.int16), wanted.nan_to_num().view(torch.int16)), (
                shift,
                width,
            )
