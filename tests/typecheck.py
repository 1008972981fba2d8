"""The type checker of the test suite: beartype, which like mypy takes an int where a float is asked."""

from beartype import BeartypeConf, beartype

typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))
