"""`python -m evolm`: the command line."""

from evolm.cli import main

main()
