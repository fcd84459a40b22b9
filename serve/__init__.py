"""Serving: requests, paged KV memory, the scheduler, the engine and the API process around one decoder."""
