"""The choices of a user. A group's YAML file is its schema: a line's comment opens with the type
that trainer/config checks."""
