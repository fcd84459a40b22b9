"""What may change between a run and its resumption."""

import pytest

from conf.check import difference
from tests.conf_cases import TINY, checked

pytestmark = pytest.mark.usefixtures("a_folder_with_rows")


class TestDifference:
    def test_layout_and_lengths_of_the_run_may_change(self) -> None:
        saved = checked("tune=lora", "run_dir=a", ranks=4)
        other = ["parallel.pipeline=2", "parallel.recompute=full", "parallel.microbatches=3", "train.steps=7"]
        argv = [
            *other,
            "train.save_every=3",
            "train.keep_checkpoints=1",
            "train.resume=never",
            "logger=wandb",
            "optim=zero1",
        ]
        assert difference(saved, checked("tune=lora", "run_dir=b", *argv, ranks=2)) == []

    def test_all_else_is_listed(self) -> None:
        saved = checked("tune=lora")
        now = checked("tune=lora", "tune.rank=4", "optim.lr=0.001", "tune.targets=[q_proj]", "train.batch_size=3")
        assert difference(saved, now) == [
            "tune.rank: was 8, now 4",
            "tune.targets: was [q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj], now [q_proj]",
            "optim.lr: was 0.0001, now 0.001",
            "train.batch_size: was 8, now 3",
        ]

    def test_an_architecture_is_compared_too(self) -> None:
        seven = ["model=tiny", "model.architecture.num_layers=7"]
        saved, now = checked("model=tiny", architecture=TINY), checked(*seven, architecture=TINY)
        assert difference(saved, now) == ["model.architecture.num_layers: was 5, now 7"]
        assert "model.architecture.num_layers: was 5, now null" in difference(saved, checked())
        assert "model.path: was , now package:" in "\n".join(difference(saved, checked()))

    def test_a_decay_that_ends_with_the_run_follows_it(self) -> None:
        saved = checked("optim.schedule=cosine", "train.steps=5")
        assert difference(saved, checked("optim.schedule=cosine", "train.steps=9")) == []
        fixed = checked("optim.schedule=cosine", "train.steps=9", "optim.decay_steps=20")
        assert difference(saved, fixed) == ["optim.decay_steps: was 5, now 20"]
