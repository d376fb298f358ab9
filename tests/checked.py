"""The checker of signatures: an int is a float there, as the typing of Python has it (PEP 484)."""

from beartype import BeartypeConf, beartype

signature = beartype(conf=BeartypeConf(is_pep484_tower=True))
