"""`python -m pipeline.cli`: the command if its console script is not on the PATH."""

from pipeline.cli.app import main

if __name__ == "__main__":
    main()
