"""`python -m bigseg` is the command line."""

from bigseg.cli import main

main(prog_name="bigseg")
