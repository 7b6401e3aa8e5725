"""Exported files checked in other engines.

Files in reading order:

- file_checks.py: bytes and matrix products of the file
- loss_check.py: loss in the engine and here
- tokenizer_check.py: tokenizer of the file and of the model
- export.py: all checks of an exported file
"""
