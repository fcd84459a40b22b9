"""The decoder, and where its weights, configuration, tokenizer and chat template come from."""
