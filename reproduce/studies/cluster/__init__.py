"""How long does the paper's run take on a cluster? A model, and descriptions of clusters."""
