"""The mathematics: path, grids, kernels, solvers, step plans, policy; no I/O, no RL, no environment."""
