"""Operators: the spec (`reference`), its fast form on CPUs (`torch_ops`), the choice (`dispatch`)."""
