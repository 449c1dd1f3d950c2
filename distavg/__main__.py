"""`python -m distavg` is the command `distavg`."""

from distavg.cli import main

main(prog_name="distavg")
