"""`python -m train.compare` on a tiny model: ours and PyTorch, which is always there."""

import importlib.util
import re
import signal
import time
from pathlib import Path

from tests.processes import children, is_alive, run, running


def test_ours_and_pytorch_train_alike(tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    chosen = ["shapes=[tiny]", "dtypes=[float32]", "layouts=[tensor]", "peers=[megatron,torch]", "steps=1"]
    code, printed = run(tmp_path, "train.compare", *chosen, f"out={out}")
    assert code == 0, printed  # 1 if a loss didn't fall, or the first ones differed
    losses = re.findall(r"losses (\S+), (\S+)", printed)
    assert len(losses) >= 2
    assert len(set(losses)) == 1, printed
    text = out.read_text()
    assert re.search(r"\| tensor \| \d+ \| .* \| \d+ \| \d+\.\d\d \| \d+% of \d+ \|", text), text
    if importlib.util.find_spec("megatron") is None:
        assert re.search(r"\| tensor \| \d+ \| not installed \|", text), text


def test_a_stopped_comparison_leaves_no_contender_behind(tmp_path: Path) -> None:
    chosen = ["shapes=[tiny]", "dtypes=[float32]", "layouts=[pipeline]", "peers=[]", "steps=10000", "out=r.md"]
    with running(tmp_path, "train.compare", *chosen) as command:
        deadline = time.monotonic() + 60
        while len(ranks := children(command.process.pid)) < 2:
            assert time.monotonic() < deadline, command.text
            time.sleep(0.05)
        command.process.terminate()
        assert command.wait(20) == 128 + signal.SIGTERM, command.text
        assert not any(is_alive(rank) for rank in ranks)
