"""Results that survive a kill: JSON lines that a run adds to, and in FILE.settings.json beside them what made them."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import portalocker

# The keys of a line that this house reads again, and the types they have. A line has an error, a text or results.
TYPES: dict[str, tuple[type, ...]] = {
    "error": (str,),
    "text": (str,),
    "text_baseline": (str,),
    "tokens": (int,),
    "layers": (list, type(None)),
    "correct": (bool,),
    "results": (dict,),
}


# The files by which a checkpoint is loaded.
CHECKPOINT = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "processor_config.json", "preprocessor_config.json", "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip


def check_files(written: Mapping[str, Sequence[str | Path]], read: Mapping[str, Sequence[str | Path]]) -> None:
    """Refuses to write a file that is read, or one file for two keys, by whatever name.

    Args:
        written: Key -> the files that it will make.
        read: Key -> the files, or the checkpoint's folder, that it names.

    Raises:
        ValueError: A key names such a file.
    """
    taken = [(path, f"the file of {key}") for key, paths in read.items() for path in map(Path, paths)]
    for key, paths in read.items():
        taken += [(Path(folder, name), f"a file of {key}") for folder in paths for name in CHECKPOINT]
    for key, paths in written.items():
        for path in map(Path, paths):
            for other, name in taken:
                if path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other)):
                    raise ValueError(f"{key} must not be {name}, got {str(path)!r}")
        taken += [(Path(path), f"the file of {key}") for path in paths]


def result_files(output: str | PathLike[str]) -> list[Path]:
    """The files that `Results` writes."""
    path = Path(output)
    return [path, beside(path, "settings.json"), beside(path, "draft")]


def beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")


def read_results(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str | int, dict[str, Any]]]:
    """The settings of a run, and its results so far by id, while it may still be writing.

    Raises:
        ValueError: The file is not a run's, or one of its lines is not a result.
    """
    file = Path(path).resolve()
    try:
        settings = _read_settings(file)
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"output must name a run's file, with {file.name}.settings.json beside it, got {str(path)!r}: {error}"
        ) from error
    return settings, _read_lines(file, data)


class Results:
    """A file of results, one JSON object a line, each with an `id`. One run at a time writes to it.

    The file itself is locked: another name of it, or a lock file that was deleted, lets no second run in.

    Args:
        path: The file. Its lines are kept; an unfinished last one, of a run that was killed, is cut off.
        settings: All that the results depend on but their prompts, as JSON can hold it.

    Attributes:
        lines: The results so far, by id. What is taken out of it is gone from the file when it is closed.

    Raises:
        ValueError: The file holds results of other settings, or something else, cannot be written, or is in use.
    """

    def __init__(self, path: str | PathLike[str], settings: Mapping[str, Any]) -> None:
        self.name, self.path = str(path), Path(path).resolve()
        with ExitStack() as on_error:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file: BinaryIO = on_error.enter_context(self.path.open("a+b", buffering=0))
                portalocker.lock(self._file, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
                self._check_file()
                self._file.seek(0)
                data = self._file.read()
                self._check(json.loads(json.dumps(settings, default=str)), new=not data)
                self.lines = _read_lines(self.path, data)
                self._file.truncate(data.rfind(b"\n") + 1)
            except portalocker.LockException as error:
                raise ValueError(f"output: {str(path)!r} is being written by another run") from error
            except OSError as error:
                raise ValueError(f"output must name a file that can be written, got {str(path)!r}: {error}") from error
            on_error.pop_all()
        self._written = data.count(b"\n")  # lines in the file, those that a later one replaces included

    def _check_file(self) -> None:
        """Raises a ValueError unless the open file is still the one of that name."""
        if not self.path.exists() or not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
            raise ValueError(f"output: {self.name!r} was removed or replaced during the run")

    def _check(self, settings: dict[str, Any], new: bool) -> None:
        file = beside(self.path, "settings.json")
        if new:  # written at once, and before the first line: so every line has settings
            _replace(file, json.dumps(settings, indent=2) + "\n")
            return
        if not file.exists():
            raise ValueError(f"output: {self.name!r} is not a run's, it has no {file.name} beside it")
        before = _read_settings(self.path)
        if differs := [key for key in {**before, **settings} if before.get(key) != settings.get(key)]:
            changes = ", ".join(f"{key} was {before.get(key)!r} and is {settings.get(key)!r}" for key in differs)
            raise ValueError(f"output: {self.name!r} holds results of other settings ({changes}); give another")

    def write(self, lines: Iterable[dict[str, Any]]) -> int:
        """Adds the lines that are not there yet, in place of those of the same id; they are in the file when it
        returns how many they were.

        Raises:
            OSError: They cannot be written.
            ValueError: The file was removed or replaced.
        """
        new = {line["id"]: line for line in lines if self.lines.get(line["id"]) != line}
        data = "".join(json.dumps(line) + "\n" for line in new.values()).encode()
        if data:
            self._check_file()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:  # which does not say of what file
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.lines |= new
        self._written += len(new)
        return len(new)

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *exception: object) -> None:
        with self._file:
            if self._written > len(self.lines):
                self._check_file()
                _replace(self.path, "".join(json.dumps(line) + "\n" for line in self.lines.values()))


def _read_settings(path: Path) -> dict[str, Any]:
    file = beside(path, "settings.json")
    try:
        settings = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"output: {str(file)!r} is not a run's settings: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"output: {str(file)!r} is not a run's settings, which are an object, got {settings!r}")
    return settings


def _read_lines(path: Path, data: bytes) -> dict[str | int, dict[str, Any]]:
    """The whole lines by id: the last one of each, as a run that was killed leaves the one that it replaced."""
    lines = {}
    for number, text in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"output: line {number} of {str(path)!r} is not JSON: {error}") from error
        if not _is_result(line):
            shown = text.decode(errors="replace")[:80]
            raise ValueError(f"output: line {number} of {str(path)!r} is not a result of a run, got {shown}")
        lines[line["id"]] = line
    return lines


def _is_result(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and isinstance(line.get("id"), (str, int))
        and ("error" in line or "results" in line or {"text", "tokens", "layers"} <= line.keys())
        and all(isinstance(line[key], types) for key, types in TYPES.items() if key in line)
        and all(isinstance(layer, int) for layer in line.get("layers") or ())
    )


def _replace(path: Path, text: str) -> None:
    """Writes a file all at once: whoever reads it finds the old text or the new one."""
    draft = beside(path, "draft")
    try:
        draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(draft)) from error
    draft.replace(path)
