"""The loop and its edges: trainer, checkpoints, logging, evaluation, report, devices, sweeps."""
