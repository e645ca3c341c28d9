"""The configuration of a run: what may be said (schema), read and merged (values, recipes), checked (parse, limits)."""
