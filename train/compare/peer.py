"""What the peers' harnesses share: the batch, and the loop that times their steps and tells them as `train` does."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from train.compare.cases import TOKENS, Job

NOT_TRAINED = -100  # torch's and transformers' label of a token without a loss

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def batch(job: Job) -> tuple[Tensor, Tensor]:
    """Ids and labels of this data rank, int64 [rows, LENGTH]; a row's last label is NOT_TRAINED.

    Layouts with data > 1 have no other axis, so that the rank is the data rank.
    """
    ids_BT = load_file(job.ids)["ids"]
    labels_BT = torch.cat([ids_BT[:, 1:], torch.full_like(ids_BT[:, :1], NOT_TRAINED)], 1)
    mine = RANK if job.ways.data > 1 else 0
    return ids_BT.chunk(job.ways.data)[mine], labels_BT.chunk(job.ways.data)[mine]


def run(job: Job, step: Callable[[], float | Tensor | None]) -> None:
    """Runs the steps. `step` returns the mean loss over this data rank's targets; the last rank must know it."""
    for number in range(1, job.steps + 1):
        begin = time.perf_counter()
        loss = step()
        told = torch.tensor(math.nan if loss is None else float(loss))
        if job.ways.data > 1:
            dist.all_reduce(told)
            told /= job.ways.data
        elif WORLD > 1:
            dist.broadcast(told, WORLD - 1)
        seconds = time.perf_counter() - begin
        if RANK == 0:
            record = {"step": number, "loss": float(told), "tokens": TOKENS, "tokens_per_second": TOKENS / seconds}
            with open(job.metrics, "a") as out:
                out.write(json.dumps(record) + "\n")
