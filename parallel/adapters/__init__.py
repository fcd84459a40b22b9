"""Parameter-efficient fine-tuning on the sharded decoder, in PEFT's file format."""
