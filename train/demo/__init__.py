"""The demo: fine-tunes a chat model on the rows beside this file and shows what it learned."""
