"""LeRobot's flow policies (pi0, pi0.5, SmolVLA, EO-1): opened, run by rlflow's chain, saved for plain LeRobot."""
