"""`python -m slmjax` is the `slmjax` command."""

from slmjax.cli import main

if __name__ == "__main__":
    main()
