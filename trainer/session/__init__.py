"""One run, from the recipe to the result."""
