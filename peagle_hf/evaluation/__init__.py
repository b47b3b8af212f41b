"""Measuring drafters: in real vLLM, on running servers, and from cached hidden states."""
