"""Sharded tensors to and from safetensors files: each rank writes and reads exactly its own bytes.

A checkpoint is a directory that is a valid model or adapter directory, with `train_state/` beside it for what only
training needs. It is written under another name and renamed when every byte is on disk, so a crash at any moment
leaves the previous checkpoint as it was:

    checkpoints/.step-20.partial/   written by all ranks, each tensor block once, at its place in the file
    checkpoints/step-20/            after the rename by rank 0
    checkpoints/latest -> step-20   a relative link, replaced by rename

`python -m parallel.checkpoint inspect|verify <dir>` says what is in one, and whether it is undamaged.
"""

from parallel.checkpoint.blocks import Block, TensorFile, reader, renamed
from parallel.checkpoint.directory import begin, keep_newest, save

__all__ = ["Block", "TensorFile", "begin", "keep_newest", "reader", "renamed", "save"]
