"""`python -m w8a8`."""

from w8a8.cli import main

main()
