"""Asks a Janus model about images, with DoLa on or off: the program `janus_dola.programs.answer`; --help tells more."""

from janus_dola.programs.answer import run
from janus_dola.programs.options import run_program

if __name__ == "__main__":
    run_program(run)
