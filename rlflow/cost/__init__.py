"""What a recipe will cost before it starts: rows by formula, memory and time by tracing its code without storage."""
