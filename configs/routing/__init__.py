"""One recipe for each routing rule, at the size of the default job (configs/tiny.py)."""
