"""An experiment and its compiled train step. Nothing here reads or writes files."""
