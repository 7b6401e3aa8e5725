"""`python -m slmjax` is the `slmjax` command."""

from slmjax.cli import main

main()
