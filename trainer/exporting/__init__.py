"""Results for use elsewhere. Each is loaded back and compared before it counts as written."""
