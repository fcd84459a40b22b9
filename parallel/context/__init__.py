"""Context parallelism: the tokens of a pack over several ranks. `plan` says who holds what, `attention` runs it."""
