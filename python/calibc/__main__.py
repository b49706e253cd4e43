"""The command `calibc`, also as `python -m calibc`: the same program as the Rust binary, with the same exit codes."""

from __future__ import annotations

import signal
import sys

from calibc import _native


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    # Python would only note Ctrl-C and act on it when the command is over; by default it ends the process at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _native.main(["calibc", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
