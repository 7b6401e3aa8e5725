"""The `slmjax` command, also as `python -m slmjax`: `cli.main`, which is imported with signals handled."""

import contextlib
import os
import sys

from slmjax.stop_signals import Stopped, StopSignals


def main() -> None:
    """Run the command line of this process, and exit with its status."""
    with StopSignals(is_command=True) as signals:
        from slmjax.cli import main as run

        status = 0
        try:
            run()
        except SystemExit as end:
            if isinstance(end.code, str):  # a message
                raise
            status = end.code or 0
        except Stopped as stopped:  # at the end of the command, while its status was decided
            print(stopped, file=sys.stderr)
            status = stopped.status
        signals.exit_with(status)
        if signals.received and not signals.is_shared:
            # All that had to be saved or deleted is. The end of the interpreter may wait for, or crash in,
            # threads of libraries that the signal has interrupted.
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
        sys.exit(status)


if __name__ == "__main__":
    main()
