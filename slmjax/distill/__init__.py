"""Distillation: a student learns from a teacher's predictions, or starts from a subset of its parameters."""
