"""Code that runs inside vLLM's own processes, whose Python needs nothing of this project but this folder."""
