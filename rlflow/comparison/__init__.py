"""Several runs side by side, seeds as one, and methods summed up over tasks."""
