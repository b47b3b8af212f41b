"""Code that runs in or around vLLM's own processes; it imports nothing else of this package."""
