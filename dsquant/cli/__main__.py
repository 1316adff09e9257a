"""`python -m dsquant.cli`, which is what launchers of several processes start."""

from dsquant.cli import main

main(prog_name="dsquant")
