"""PEFT over transformers, one process: LoRA on all linears, or P-tuning v2 (PEFT's prefix tuning).

The frozen base has the computation's type from the start; the adapter is float32 under autocast.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from conf.schema import LINEARS
from train.compare.cases import LEARNING_RATE, LORA_ALPHA, LORA_RANK, VIRTUAL_TOKENS, Job
from train.compare.peer import batch, run


def main(job: Job) -> None:
    """Builds the model and trains its adapter."""
    bf16 = job.dtype == "bfloat16"
    base = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype), attn_implementation="sdpa")
    base.config.use_cache = False
    adapter: PeftConfig = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS)
    if job.ways.tune == "lora":
        adapter = LoraConfig(task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=list(LINEARS))
    model = get_peft_model(base, adapter)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    ids_BT, _ = batch(job)  # transformers shifts the labels by itself

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for part_BT in ids_BT.split(job.microbatch_rows):
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                loss = model(input_ids=part_BT, labels=part_BT).loss / job.microbatches
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        return total

    run(job, step)


if __name__ == "__main__":
    main(Job.read(sys.argv[1]))
