"""Programs on the library: the one place that imports janus.

The console script `janus-dola [answer | calibrate | draw | export | report | web] [config=FILE] key=value ...`, by
default `answer`.
"""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

PROGRAMS = ("answer", "calibrate", "draw", "export", "report", "web")


def main() -> None:
    """The console script: runs the program that the first argument names."""
    if sys.argv[1:] == ["--version"]:
        print(f"janus-dola {version('janus-dola')}")
        return
    first = sys.argv[1] if sys.argv[1:] else ""
    if first == "help":
        sys.argv[1] = "--help"
    elif first and "=" not in first and not first.startswith("-") and first not in PROGRAMS:
        near = difflib.get_close_matches(first, PROGRAMS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"programs are {', '.join(PROGRAMS)}; --help shows the keys"
        print(f"error: arguments must be written key=value, got {first!r}; {hint}", file=sys.stderr)
        sys.exit(2)
    name = sys.argv.pop(1) if first in PROGRAMS else "answer"

    def run(argv: Sequence[str]) -> int | None:
        try:
            program = import_module(f"janus_dola.programs.{name}")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("janus."):
                raise
            raise ImportError(
                f"{error.name} is missing: the package 'janus' here is another one of that name (the registry's is an "
                "async queue); install janus-dola in an environment without it"
            ) from error
        return program.run(argv)

    try:  # the imports take seconds, in which one may have second thoughts
        from janus_dola.programs.options import run_program

        run_program(run)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def lmms_eval_manifest() -> Any:
    """The entry point by which lmms-eval finds the model; it loads nothing until a run asks for it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("janus_dola", simple_class_path="janus_dola.programs.lmms_eval.JanusDoLa")
