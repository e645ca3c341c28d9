"""Methods over several tasks, summed up."""
