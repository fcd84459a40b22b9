"""Loads the CUDA backend: the ops of `kernels.reference` for float32, float16 and bfloat16 on NVIDIA GPUs.

`kernels/cuda/` has the sources, `ONEMESH_CUDA=1 make install` builds them. `cuda_attention`, `cuda_linear`,
`cuda_loss`, `cuda_prefix`, `cuda_rows` and `cuda_sampling` offer them. No GPU has run them: `docs/cuda.md` says what is
known.
"""

from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_cuda.so")


def load() -> bool:
    """Loads the library; False if it isn't built.

    Raises:
        RuntimeError: it is built, but doesn't load: for another torch.
    """
    if not LIBRARY.is_file():
        return False
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise RuntimeError(
            f"{LIBRARY} doesn't load ({error}); build it again: ONEMESH_CUDA=1 make clean install"
        ) from None
    return True
