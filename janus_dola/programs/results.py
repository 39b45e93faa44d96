"""Results that survive a kill: JSON lines that a run adds to, and in FILE.settings.json beside them what made them."""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")


def read_results(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str | int, dict[str, Any]]]:
    """The settings of a run, and its results so far by id, while it may still be writing.

    Raises:
        ValueError: The file is not a run's.
    """
    file = Path(path)
    try:
        settings = json.loads(beside(file, "settings.json").read_text(encoding="utf-8"))
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"output must name a run's file, with {file.name}.settings.json beside it, got {str(path)!r}: {error}"
        ) from error
    whole = data[: data.rfind(b"\n") + 1]
    return settings, {line["id"]: line for line in map(json.loads, whole.splitlines())}


class Results:
    """A file of results, one JSON object a line, each with an `id`. One run at a time writes to it.

    Args:
        path: The file. Its lines are kept; an unfinished last one, of a run that was killed, is cut off.
        settings: All that the results depend on, as JSON can hold it.

    Attributes:
        lines: The results so far, by id.

    Raises:
        ValueError: The file holds results of other settings, or something else, cannot be written, or is in use.
    """

    def __init__(self, path: str | PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        with ExitStack() as on_error:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._lock = FileLock(self._beside("lock"))
                self._lock.acquire(blocking=False)
                on_error.callback(self._lock.release)
                data = self.path.read_bytes() if self.path.exists() else b""
                self._check(json.loads(json.dumps(settings, default=str)), new=not data)
                whole = data[: data.rfind(b"\n") + 1]
                self._file = self.path.open("ab")
                self._file.truncate(len(whole))
            except Timeout as error:
                raise ValueError(f"output: {str(path)!r} is being written by another run") from error
            except OSError as error:
                raise ValueError(f"output must name a file that can be written, got {str(path)!r}: {error}") from error
            on_error.pop_all()
        self.lines: dict[str | int, dict[str, Any]] = {line["id"]: line for line in map(json.loads, whole.splitlines())}

    def _beside(self, ending: str) -> Path:
        return beside(self.path, ending)

    def _check(self, settings: dict[str, Any], new: bool) -> None:
        file = self._beside("settings.json")
        if new:  # written at once, and before the first line: there is no line without
            draft = self._beside("settings.json.draft")
            draft.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            draft.replace(file)
            return
        if not file.exists():
            raise ValueError(f"output: {str(self.path)!r} is not a run's, it has no {file.name} beside it")
        before = json.loads(file.read_text(encoding="utf-8"))
        if differs := [key for key in {**before, **settings} if before.get(key) != settings.get(key)]:
            changes = ", ".join(f"{key} was {before.get(key)!r} and is {settings.get(key)!r}" for key in differs)
            raise ValueError(f"output: {str(self.path)!r} holds results of other settings ({changes}); give another")

    def write(self, lines: Iterable[dict[str, Any]]) -> int:
        """Adds the lines whose id has none; they are in the file when it returns how many they were."""
        new = {line["id"]: line for line in lines if line["id"] not in self.lines}
        self._file.write("".join(json.dumps(line) + "\n" for line in new.values()).encode())
        self._file.flush()
        self.lines |= new
        return len(new)

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._lock.release()
