"""The `slmjax` command, also as `python -m slmjax`: `cli.main`, which is imported with signals handled."""

from slmjax.stop_signals import StopSignals


def main() -> None:
    """Run the command line of this process."""
    with StopSignals(is_command=True):
        from slmjax.cli import main as run

        run()


if __name__ == "__main__":
    main()
