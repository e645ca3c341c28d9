"""The loop and its edges: trainer, checkpoints, logging, signals, sweeps."""
