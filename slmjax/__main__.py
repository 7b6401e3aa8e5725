"""The `slmjax` command, also as `python -m slmjax`: `cli.main`, which is imported with signals handled."""

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
        sys.exit(status)


if __name__ == "__main__":
    main()
