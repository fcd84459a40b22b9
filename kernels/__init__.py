"""Operators: the spec (`reference`), its fast torch form (`torch_ops`, `autograd`) and the choice (`dispatch`)."""
