"""The drafter: its configuration, its layout of slots, attention, weights, and its files as vLLM serves them."""
