"""The experiment: the paper's training run, and what surrounds it."""
