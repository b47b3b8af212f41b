"""Code that runs in or around vLLM's own processes and needs nothing of this project but this folder."""
