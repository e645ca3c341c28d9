"""What a run folder shows: the record, tables, figures, films, the HTML page, and comparisons of several runs."""
