"""Speed of the kernels beside torch's: `python -m kernels.bench <family>` measures and writes a report."""
