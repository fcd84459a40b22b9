"""Meshes, collectives on uneven sizes, and what a training step communicates: operation, axis, bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conf.schema import TuneConf
from kernels import dispatch
from parallel import comm
from parallel.comm import Launch, PeerLost
from parallel.mesh import Mesh
from tests.models import TINY, RandomWeights
from tests.ranks import on_ranks
from tests.training import Run, layout, rows_of
from train.model import build_model
from train.step import Trainer


def _groups(launch: Launch) -> dict[str, tuple[int, ...]]:
    mesh = Mesh.build(launch, data=2, pipeline=1, context=2, tensor=2)
    names = ("data", "pipeline", "context", "tensor", "replicas", "replicas_tensor", "model", "ends", "world")
    return {name: getattr(mesh, name).ranks for name in names}


def test_tensor_is_innermost_and_data_outermost() -> None:
    groups = on_ranks(8, _groups)
    assert groups[0] == {
        "data": (0, 4),
        "pipeline": (0,),
        "context": (0, 2),
        "tensor": (0, 1),
        "replicas": (0, 2, 4, 6),
        "replicas_tensor": tuple(range(8)),
        "model": (0, 1),
        "ends": (0,),
        "world": tuple(range(8)),
    }
    assert groups[7]["tensor"] == (6, 7)
    assert groups[7]["context"] == (5, 7)


def _ends(launch: Launch) -> tuple[tuple[int, ...], str]:
    mesh = Mesh.build(launch, pipeline=3, tensor=1)
    return mesh.ends.ranks, mesh.label


def test_first_and_last_stage_share_a_group() -> None:
    assert [ranks for ranks, _ in on_ranks(3, _ends)] == [(0, 2), (1,), (0, 2)]
    assert on_ranks(3, _ends)[1][1] == "rank 1 tp0 pp1 cp0 dp0"


def _collectives(launch: Launch) -> None:
    mesh = Mesh.build(launch, tensor=3)
    me, group = launch.rank, mesh.tensor
    sizes = (3, 0, 2)
    own = torch.full((4, sizes[me]), float(me))
    whole = comm.all_gather(own, group, sizes, dim=1)
    assert whole.tolist() == [[0.0, 0.0, 0.0, 2.0, 2.0]] * 4
    assert comm.all_reduce(torch.tensor([me + 1.0]), group).item() == 6
    assert comm.all_reduce(torch.tensor([me]), group, "max").item() == 2
    for payload in (b"", b"x", b"y" * 4088, b"z" * 4089, b"onemesh" * 1000):
        assert comm.broadcast_bytes(payload if me == 1 else b"?", group, 1) == payload
    assert comm.broadcast(torch.tensor([me]), group, 2).item() == 2
    assert mesh.traffic.calls[("all_gather", "tensor")] == 1
    assert mesh.traffic.bytes[("all_gather", "tensor")] == 3 * 4 * 4


def test_collectives_on_uneven_and_empty_parts() -> None:
    on_ranks(3, _collectives)


def _ordered(launch: Launch) -> tuple[list[float], list[float]]:
    mesh = Mesh.build(launch, tensor=4)
    random = torch.Generator().manual_seed(launch.rank)
    rows = torch.randn(64, 576, generator=random)
    whole = comm.sum_in_rank_order(rows.clone(), mesh.tensor)
    alone = comm.sum_in_rank_order(rows[37:38].clone(), mesh.tensor)
    return whole[37].tolist(), alone[0].tolist()


def test_a_row_is_summed_alike_in_any_company() -> None:
    for together, alone in on_ranks(4, _ordered):
        assert together == alone


def _disagree(launch: Launch) -> list[str]:
    mesh = Mesh.build(launch, tensor=3)
    return comm.disagreements({"rows": "same", "checkpoint": str(launch.rank == 2)}, mesh.world)


def test_a_rank_with_other_inputs_is_noticed_by_all() -> None:
    assert on_ranks(3, _disagree) == [["checkpoint"]] * 3


def test_one_rank_needs_no_process_group() -> None:
    mesh = Mesh.single()
    x = torch.ones(3)
    assert comm.all_reduce(x, mesh.world) is x
    assert comm.all_gather(x, mesh.tensor, (3,), 0) is x
    assert comm.broadcast_bytes(b"a", mesh.data) == b"a"
    assert mesh.traffic.calls == {}


def _lost(launch: Launch) -> str:
    mesh = Mesh.build(launch, tensor=2)
    comm.barrier(mesh.world)
    if launch.rank == 1:
        comm.stop()
        return ""
    with pytest.raises(PeerLost) as caught:
        _reduce_for_ever(mesh)
    return str(caught.value)


def _reduce_for_ever(mesh: Mesh) -> None:
    while True:
        comm.all_reduce(torch.ones(1), mesh.tensor)


def test_a_lost_peer_is_named() -> None:
    message = on_ranks(2, _lost)[0]
    assert message.startswith("[rank 0 on ")
    assert "all_reduce over the tensor axis failed: lost rank 1" in message


def _traffic(launch: Launch, run: Run) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int], int]:
    mesh = Mesh.build(launch, data=run.data, pipeline=run.pipeline, tensor=run.tensor)
    ops = dispatch.select(torch.device("cpu"), torch.float32)
    trainer = Trainer(run.config, build_model(run.config, RandomWeights(run.architecture), mesh, ops))
    mesh.traffic.clear()
    result = trainer.step(1, rows_of(1, run.batch_size, run.architecture.vocab_size))
    return mesh.traffic.calls, mesh.traffic.bytes, result.tokens


def test_a_tensor_parallel_step_reduces_twice_a_layer_each_way() -> None:
    run = layout(tensor=2, dtype="float32")
    calls, sizes, tokens = on_ranks(2, _traffic, run)[0]
    layers = TINY.num_layers
    # forward: embedding, 2 a layer, loss (max; sum and picked logit). backward: 2 a layer, loss's hidden; one for the
    # keys and values of the KV head that both ranks hold
    assert calls[("all_reduce", "tensor")] == 1 + 2 * layers + 2 + 2 * layers + 1 + 1
    hidden = tokens * TINY.width * 4
    targets = sum(int(row.targets[1:].sum()) for row in rows_of(1, run.batch_size, TINY.vocab_size))
    loss = targets * 4 + 2 * targets * 4 + targets * TINY.width * 4
    shared = layers * 2 * TINY.num_kv_heads * TINY.head_dim * TINY.width * 4
    assert sizes[("all_reduce", "tensor")] == hidden * (1 + 4 * layers) + loss + shared
    assert ("all_reduce", "data+context") not in calls


def test_lora_adds_only_its_replicated_factors() -> None:
    run = replace(layout(tensor=2, dtype="float32"), tune=TuneConf(kind="lora", rank=4))
    full, _, _ = on_ranks(2, _traffic, replace(run, tune=TuneConf(kind="full")))[0]
    calls, sizes, _ = on_ranks(2, _traffic, run)[0]
    # nothing below the first layer's linears trains, so their input needs no gradient
    assert calls[("all_reduce", "tensor")] == full[("all_reduce", "tensor")] - 1
    replicated = TINY.num_layers * 4 * (3 * TINY.width + 2 * TINY.width + 2 * TINY.width) * 4
    assert calls[("all_reduce", "data+context+tensor")] == 1
    assert sizes[("all_reduce", "data+context+tensor")] == replicated


def test_data_parallel_sums_each_gradient_once() -> None:
    run = layout(data=2, dtype="float32", microbatches=3)
    calls, sizes, _ = on_ranks(2, _traffic, run)[0]
    ops = dispatch.select(torch.device("cpu"), torch.float32)
    model = build_model(run.config, RandomWeights(TINY), Mesh.single(), ops)
    parameters = sum(p.nbytes for _, p in model.trainable())
    assert sizes[("all_reduce", "data+context")] == parameters + 8 + 2 * 8  # and the loss, and the token counts
    assert ("all_reduce", "data") not in calls
