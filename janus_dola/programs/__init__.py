"""Programs on the library: the one place that imports janus.

The console script `janus-dola [answer | calibrate | draw | export | report | web] [config=FILE] key=value ...`, by
default `answer`.
"""

import difflib
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    """The console script: runs the program that the first argument names."""
    if sys.argv[1:] == ["--version"]:
        print(f"janus-dola {version('janus-dola')}")
        return
    # The imports take seconds, in which one may have second thoughts. A KeyboardInterrupt can get lost there: what is
    # raised while an import gives back its lock is ignored.
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        from janus_dola.programs.keys import SCHEMAS
        from janus_dola.programs.options import DEFAULT, ModelConfig, config_files, read_config, run_program

        def run(argv: Sequence[str]) -> int | None:
            first = argv[0] if argv else ""
            if first == "help":
                argv = ["--help", *argv[1:]]
            elif first and "=" not in first and not first.startswith("-") and first not in SCHEMAS:
                near = difflib.get_close_matches(first, SCHEMAS, n=1)
                programs = f"programs are {', '.join(SCHEMAS)}; --help shows the keys"
                hint = f"did you mean {near[0]!r}?" if near else programs
                raise ValueError(f"arguments must be written key=value, got {first!r}; {hint}")
            name, argv = (first, argv[1:]) if first in SCHEMAS else ("answer", argv)
            schema = SCHEMAS[name]
            if not any(Path(file).is_fifo() for file in config_files(argv)):  # which the program alone can read
                # --help and an error in the arguments come before the program's imports.
                read_config(schema, argv, DEFAULT if issubclass(schema, ModelConfig) else None)
            try:
                program = import_module(f"janus_dola.programs.{name}")
                signal.signal(signal.SIGINT, handler)
            except ModuleNotFoundError as error:
                if not (error.name or "").startswith("janus."):
                    raise
                raise ImportError(
                    f"{error.name} is missing: the package 'janus' here is another one of that name (the registry's is "
                    "an async queue); install janus-dola in an environment without it"
                ) from error
            return program.run(argv)

        run_program(run)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, handler)


def interrupt(*_: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


def lmms_eval_manifest() -> Any:
    """The entry point by which lmms-eval finds the model; it loads nothing until a run asks for it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("janus_dola", simple_class_path="janus_dola.programs.lmms_eval.JanusDoLa")
