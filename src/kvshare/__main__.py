"""`python -m kvshare`."""

from kvshare.cli.main import main

main()
