"""What errors of a user say, in one line."""

import difflib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path


def first_line(error: BaseException) -> str:
    """The first line of what it says, and the second where the first ends with a colon."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first


def unknown_key(key: str, names: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {prefix + near[0]!r}?" if near else f"allowed are {', '.join(names)}"
    return f"unknown key {prefix + key!r}, {hint}"


def read_bytes(path: str | PathLike[str], key: str) -> bytes:
    """The contents of the file that `key` names.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{key} must name a file that can be read, got {str(path)!r}: {error.strerror}") from error
