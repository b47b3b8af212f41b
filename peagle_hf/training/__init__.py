"""Training a drafter: arguments, objective, the Trainer, checkpoints, and what a run records."""
