"""`python -m slmops`: the command line where no script is installed, as under `accelerate launch -m slmops`."""

from slmops.cli import main

main()
