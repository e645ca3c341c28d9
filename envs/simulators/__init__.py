"""Simulators: MuJoCo, MuJoCo Warp, Gymnasium, EnvPool, MetaWorld, OGBench, PushT, and toys of our own."""
