"""Running on a Slurm cluster: the batch scripts, the job they belong to, and what a node does for it."""
