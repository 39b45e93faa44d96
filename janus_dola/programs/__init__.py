"""Programs on the library: the one place that imports janus.

The console script `janus-dola [answer | calibrate] [config=FILE] key=value ...`; `answer` is the default.
"""

import sys
from importlib import import_module

PROGRAMS = ("answer", "calibrate")


def main() -> None:
    """The console script: runs the program that the first argument names."""
    from janus_dola.programs.options import run_program

    name = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in PROGRAMS else "answer"
    run_program(import_module(f"janus_dola.programs.{name}").run)
