"""Many processes: torch.distributed in few verbs, parameters held in parts, statistics merged over ranks."""
