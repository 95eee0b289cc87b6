"""`python -m lirefs`: the command line."""

from lirefs.cli.app import main

if __name__ == "__main__":
    main()
