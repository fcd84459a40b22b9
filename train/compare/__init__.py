"""Training speed and memory beside Megatron-core, PyTorch, DeepSpeed and PEFT, measured in one run."""
