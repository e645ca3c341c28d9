"""`rlflow doctor`: does a recipe do what it says? Checks with their figures and bounds."""
