"""How fast the ops are: one module per family, each with `run() -> str`, its tables in Markdown."""
