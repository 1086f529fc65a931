"""`python -m cloudsave`."""

from cloudsave.cli.main import main

main()
