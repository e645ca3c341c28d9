"""Off-policy learning: SAC with gradients through the chain, its replay, critics, temperature, demonstrations."""
