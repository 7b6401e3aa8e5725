"""Distillation: a student that learns from a teacher's predictions, and one that begins as a part of its
teacher.
"""
