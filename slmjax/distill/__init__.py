"""Distillation: a student learns from a teacher's predictions, or starts from a subset of its parameters.

Files in reading order:

- config.py: `objective.distill`
- objective.py: loss weights and the loss in a train step
- slices.py: the part of a teacher for each parameter of a smaller student
- layers.py: initialise a student from layers of its teacher
- windows.py: teachers with a short context read overlapping windows
- teachers.py: frozen teachers and their outputs
"""
