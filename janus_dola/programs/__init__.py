"""Programs on the library: the one place that imports janus.

The console script `janus-dola [answer | calibrate | export | report | web] [config=FILE] key=value ...`, by default
`answer`.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

PROGRAMS = ("answer", "calibrate", "export", "report", "web")


def main() -> None:
    """The console script: runs the program that the first argument names."""
    from janus_dola.programs.options import run_program

    if sys.argv[1:] == ["--version"]:
        print(f"janus-dola {version('janus-dola')}")
        return
    if sys.argv[1:2] == ["help"]:
        sys.argv[1] = "--help"
    name = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in PROGRAMS else "answer"

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

    run_program(run)


def lmms_eval_manifest() -> Any:
    """The entry point by which lmms-eval finds the model; it loads nothing until a run asks for it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("janus_dola", simple_class_path="janus_dola.programs.lmms_eval.JanusDoLa")
