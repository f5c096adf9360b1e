"""`python -m airstream` is `airstream`: a process of its own, which says nothing when it is interrupted."""

import sys


def main() -> int:
    """Run the command that the arguments of the process name. Returns its exit status."""
    try:
        from airstream.cli import main as run

        return run()
    except KeyboardInterrupt:  # while that was imported
        return 130


if __name__ == "__main__":
    sys.exit(main())
