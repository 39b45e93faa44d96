"""Asks a Janus model about images, with DoLa on or off: the program `janus_dola.programs.answer`; --help tells more."""

from janus_dola.programs import main

if __name__ == "__main__":
    main()
