"""A tiny random model of each family, put through what the program promises.

families_*.py   the families, and the checks that each kind goes through
making.py       a folder with a random model and a tokenizer over bytes
checks.py       checks of any kind of model
checks_*.py     checks of one kind
running.py      a family in a process of its own, and the outcome of each check
table.py        docs/families.md
"""
