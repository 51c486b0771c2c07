"""Studies: many runs that compare methods, with a table and a page at the end."""
