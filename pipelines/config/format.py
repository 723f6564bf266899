"""The version of what a run's folder holds: config.yaml, status.json and every checkpoint bear it.

What bears none is of version 1. docs/reliability.md says what keeps folders readable for ever.
"""

from equipoise.errors import InputError

FORMAT = 1
KEY = "format"  # under which each of the three has it


class NewerError(InputError):
    """A file is of a later version of Equipoise than this one."""


def check_format(found: object, where: object) -> None:
    """Whether this version can read what bears that number.

    Raises:
        NewerError: a later one is needed.
        ValueError: the number is none.
    """
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"{KEY} must be a whole number from 1 on, got {str(found)[:40]!r}")
    if found > FORMAT:
        raise NewerError(
            f"{where}: was written by a later version of Equipoise (format {found}; this one reads up to {FORMAT}). "
            "Upgrade: pip install --upgrade equipoise."
        )
