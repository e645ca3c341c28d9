"""`python -m rlflow` is the command `rlflow`."""

from rlflow.cli import main

if __name__ == "__main__":
    main()
