"""Annotated shapes are executed in tests. As in PEP 484, an int is accepted where a float is asked
for."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
