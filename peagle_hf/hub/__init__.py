"""The Hugging Face hub: what is uploaded of a drafter, and its card."""
