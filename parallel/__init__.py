"""The sharded model: mesh and collectives, sharding, the decoder and its files, pipelines, adapters, checkpoints."""
