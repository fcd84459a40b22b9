"""Paged attention of the torch backend: right, row-invariant bit for bit, and deaf to what it must not read."""

import dataclasses
import math
import random

import pytest
import torch
import torch.nn.functional as F

from kernels import reference, torch_ops
from kernels.dispatch import REFERENCE
from kernels.paged import PagedLayout
from tests.backends import BACKENDS, backend

LOW = [torch.float32, torch.bfloat16]


def draw(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Requests with their pages in one shuffled cache; every slot that no request owns is NaN."""

    dtype: torch.dtype
    page_size: int
    heads: tuple[int, ...]
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    q: list[torch.Tensor]
    kv: list[tuple[torch.Tensor, torch.Tensor]]
    tables: list[list[int]]
    prefix_tables: list[list[int]]
    caches: tuple[torch.Tensor, torch.Tensor]

    def layout(self, ops, picks: list[tuple[int, int, int]], junk: list[int] | None = None) -> PagedLayout:
        """One step of (request, queries, keys); `junk` pads the tables of every chunk."""
        requests = [b for b, _, _ in picks]
        return ops.paged_layout(
            [queries for _, queries, _ in picks],
            [keys for _, _, keys in picks],
            [self.tables[b] + (junk or []) for b in requests],
            page_size=self.page_size,
            prefix_lengths=[self.prefixes[b] for b in requests],
            prefix_tables=[self.prefix_tables[b] + (junk or []) for b in requests],
        )

    def run(self, ops, picks, window=None, junk=None) -> tuple[torch.Tensor, torch.Tensor]:
        q = torch.cat([self.q[b][keys - queries : keys] for b, queries, keys in picks])
        head_dim = q.shape[-1]
        return ops.attention_paged(
            q,
            *self.caches,
            self.layout(ops, picks, junk),
            kv_index=self.heads,
            window=window,
            scale=head_dim**-0.5,
        )


def make_world(dtype, *, lengths, prefixes, heads, head_dim=16, page_size=16, seed=0) -> World:
    """Requests of one prefix length share that prefix's pages, as the requests of one adapter do."""
    chance, num_kv_heads = random.Random(seed), max(heads) + 1

    def pages_of(n: int) -> int:
        return -(-n // page_size)

    sizes = [*lengths, *sorted(set(prefixes))]
    free = list(range(sum(map(pages_of, sizes)) + 3))
    total = len(free)
    chance.shuffle(free)
    tables = [[free.pop() for _ in range(pages_of(n))] for n in sizes]
    shared = dict(zip(sorted(set(prefixes)), tables[len(lengths) :], strict=True))
    shape = (total, page_size, num_kv_heads, head_dim)
    caches = tuple(torch.full(shape, math.nan, dtype=dtype) for _ in range(2))
    kv = []
    for i, (size, table) in enumerate(zip(sizes, tables, strict=True)):
        rows = [draw(size, num_kv_heads, head_dim, seed=1000 * s + i, dtype=dtype) for s in (1, 2)]
        positions = torch.arange(size)
        slots = torch.tensor([*table, 0])[positions // page_size] * page_size + positions % page_size
        torch_ops.write_pages(*caches, *rows, slots)
        kv.append(tuple(rows))
    return World(
        dtype=dtype,
        page_size=page_size,
        heads=heads,
        lengths=tuple(lengths),
        prefixes=tuple(prefixes),
        q=[draw(n, len(heads), head_dim, seed=i, dtype=dtype) for i, n in enumerate(lengths)],
        kv=kv,
        tables=tables[: len(lengths)],
        prefix_tables=[shared[p] for p in prefixes],
        caches=caches,
    )


SHAPES = [
    {"heads": (0, 0, 0, 1, 1, 1), "head_dim": 64, "page_size": 16},
    {"heads": (0, 1, 1), "head_dim": 24, "page_size": 7},
    {"heads": (0, 1), "head_dim": 8, "page_size": 1},
    {"heads": (0,) * 9, "head_dim": 16, "page_size": 64},
]


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("window", [None, 40, 600])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.usefixtures("thread_counts")
def test_a_token_has_one_result_in_any_company(dtype, shape, window, kernels):
    """Random steps against each request alone in one chunk: bitwise, out and lse, at 1 and 2 threads."""
    ops = backend(kernels, dtype)
    world = make_world(
        dtype, lengths=(1, 2, 255, 256, 257, 700, 530, 90, 1), prefixes=(0, 20, 0, 5, 300, 0, 20, 0, 5), **shape
    )
    torch.set_num_threads(1)
    alone = [world.run(ops, [(b, n, n)], window) for b, n in enumerate(world.lengths)]
    chance = random.Random(len(shape["heads"]))
    for step in range(6):
        torch.set_num_threads(1 + step % 2)
        picks = []
        for b in chance.sample(range(len(world.lengths)), chance.randint(1, len(world.lengths))):
            keys = chance.randint(1, world.lengths[b])
            picks.append((b, min(keys, chance.choice([1, 1, 1, 2, 7, 64, 512])), keys))
        got = world.run(ops, picks, window, junk=[chance.choice([-1, 10**12])])
        for part, name in ((0, "out"), (1, "lse")):
            expected = torch.cat([alone[b][part][keys - n : keys] for b, n, keys in picks])
            assert torch.equal(got[part], expected), (step, name, picks)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("dtype", LOW)
def test_chunk_sizes_give_the_same_bits(dtype, chunk, kernels):
    ops = backend(kernels, dtype)
    world = make_world(dtype, lengths=(600,), prefixes=(20,), heads=(0, 0, 0))
    out, lse = world.run(ops, [(0, 600, 600)])
    for start in range(0, 600, chunk):
        stop = min(start + chunk, 600)
        part = world.run(ops, [(0, stop - start, stop)])
        assert torch.equal(part[0], out[start:stop]) and torch.equal(part[1], lse[start:stop])


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
@pytest.mark.parametrize("dtype", LOW)
def test_decoding_has_the_bits_of_a_chunk(dtype, group, window):
    """One query is computed by other loops than several; a window leaves out whole extents behind the prefix."""
    ops = backend("compiled", dtype)
    head_dim = (64, 16, 34, 80, 128)[group % 5]
    heads = (0,) * group + (1, 2, 2)
    world = make_world(dtype, lengths=(1300,), prefixes=(70,), heads=heads, head_dim=head_dim)
    for keys in (1, 15, 64, 500, 1151, 1300):
        chunk = world.run(ops, [(0, 2, max(keys, 2))], window)
        expected = [part[int(keys > 1)] for part in chunk]
        for requests in (1, 12):  # one is cut into extents for the threads, many are not
            alone = world.run(ops, [(0, 1, keys)] * requests, window)
            assert all(torch.equal(a, e) for part, e in zip(alone, expected, strict=True) for a in part), keys


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
def test_where_the_pages_lie_does_not_matter(dtype, kernels):
    """Another seed shuffles the pages otherwise and the free slots hold other values."""
    ops = backend(kernels, dtype)
    kinds = [
        make_world(dtype, lengths=(300, 40), prefixes=(5, 0), heads=(0, 0, 1), page_size=size, seed=seed)
        for size, seed in ((16, 0), (16, 1), (5, 2))
    ]
    kinds[1].caches[0].nan_to_num_(1e30)
    kinds[1].caches[1].nan_to_num_(-1e30)
    picks = [(1, 1, 40), (0, 70, 300), (1, 3, 30)]
    results = [world.run(ops, picks) for world in kinds]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", LOW)
def test_it_is_the_reference(dtype, window, kernels):
    """Against float64; at most twice the error of the reference in the low precision, plus one ulp."""
    ops = backend(kernels, dtype)
    world = make_world(dtype, lengths=(700, 257, 1), prefixes=(0, 20, 20), heads=(0, 0, 0, 1, 1, 1), head_dim=64)
    picks = [(0, 700, 700), (1, 1, 257), (2, 1, 1), (1, 60, 200)]
    got = world.run(ops, picks, window)
    plain = world.run(dataclasses.replace(ops, attention_paged=reference.attention_paged), picks, window)
    exact_world = dataclasses.replace(
        world, q=[q.double() for q in world.q], caches=tuple(c.double() for c in world.caches)
    )
    exact = exact_world.run(REFERENCE, picks, window)
    for part in (0, 1):
        error, plain_error = ((t[part].double() - exact[part]).abs().max() for t in (got, plain))
        assert error <= 2 * plain_error + torch.finfo(dtype).eps * exact[part].abs().max(), part


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
def test_it_is_the_training_attention_and_sdpa(dtype, kernels):
    ops = backend(kernels, dtype)
    world = make_world(dtype, lengths=(500, 33), prefixes=(0, 0), heads=(0, 0, 1, 1), head_dim=32)
    out, lse = world.run(ops, [(0, 500, 500), (1, 33, 33)])
    packed = [torch.cat(parts) for parts in (world.q, *zip(*world.kv[:2], strict=True))]
    expected = ops.attention_varlen(*packed, [0, 500, 533], scale=32**-0.5)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(out, expected[0], rtol=0, atol=tolerance)
    # torch's bfloat16 kernel approximates exp; `test_it_is_the_reference` holds lse to the float64 value
    torch.testing.assert_close(lse, expected[1], rtol=0, atol={torch.float32: 5e-6, torch.bfloat16: 1e-4}[dtype])
    for b, rows in ((0, slice(0, 500)), (1, slice(500, 533))):
        q, k, v = (t.transpose(0, 1)[None] for t in (world.q[b], *world.kv[b]))
        sdpa = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out[rows], sdpa[0].transpose(0, 1), rtol=0, atol=tolerance)


def test_write_pages_writes_the_named_slots_alone():
    caches = tuple(torch.full((3, 2, 1, 2), 9.0) for _ in range(2))
    k, v = torch.arange(4.0).view(2, 1, 2), torch.arange(4.0, 8.0).view(2, 1, 2)
    torch_ops.write_pages(*caches, k, v, torch.tensor([5, 2]))
    for cache, rows in zip(caches, (k, v), strict=True):
        flat = cache.flatten(0, 1)
        assert torch.equal(flat[torch.tensor([5, 2])], rows)
        assert (flat[torch.tensor([0, 1, 3, 4])] == 9.0).all()


@pytest.mark.parametrize("kernels", BACKENDS)
def test_an_empty_step(kernels):
    ops = backend(kernels, torch.float32)
    layout = ops.paged_layout([], [], [], page_size=4)
    cache = torch.zeros(2, 4, 1, 8)
    out, lse = ops.attention_paged(torch.zeros(0, 2, 8), cache, cache, layout, scale=1.0)
    assert out.shape == (0, 2, 8) and lse.shape == (0, 2)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_misfits_are_named(kernels):
    ops = backend(kernels, torch.float32)
    cache, q = torch.zeros(2, 4, 1, 8), torch.zeros(2, 2, 8)
    layout = ops.paged_layout([1], [3], [[1]], page_size=4)
    with pytest.raises(ValueError, match=r"layout has 1 queries in pages of 4, q \(2, 2, 8\)"):
        ops.attention_paged(q, cache, cache, layout, scale=1.0)
    with pytest.raises(ValueError, match="must come from this backend's paged_layout, got PagedLayout"):
        ops.attention_paged(q[:1], cache, cache, PagedLayout.build([1], [3], [[1]], page_size=4), scale=1.0)
    with pytest.raises(ValueError, match=r"write_pages: rows \(2, 2, 8\) torch.float32 don't fit"):
        ops.write_pages(cache, cache, q, q, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="use one dtype"):
        ops.attention_paged(q[:1], cache.bfloat16(), cache.bfloat16(), layout, scale=1.0)
