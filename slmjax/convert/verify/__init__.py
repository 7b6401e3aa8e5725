"""Exported files checked in other engines."""
