"""python -m janus_dola.calibrate: the program `janus_dola.programs.calibrate`."""

from janus_dola.programs.calibrate import run
from janus_dola.programs.options import run_program

if __name__ == "__main__":
    run_program(run)
