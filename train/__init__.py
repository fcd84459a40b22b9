"""Training: chats to packed tokens, the training loop, its metrics, and the small tools around them."""
