"""`python -m train.compare` on a tiny model: ours and PyTorch, which is always there."""

import importlib.util
import re
from pathlib import Path

from tests.processes import run


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
