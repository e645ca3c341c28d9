"""Networks that are told what to reach: a return, a plan of states, a goal."""
