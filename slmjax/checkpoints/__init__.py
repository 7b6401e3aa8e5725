"""Checkpoints of runs, model directories in safetensors, and loading a model from either.

Files in reading order:

- model_file.py: `model.json`, the architecture and its phases of quantization
- safetensors_files.py: weights in safetensors files
- selection.py: the best of several metrics; one that is not finite never is
- manifest.py: digests of a checkpoint's files
- step_directories.py: the directories of a run's checkpoints, and which of them retention deletes
- best_checkpoint.py: which checkpoint has the lowest held-out loss
- arrays.py: the arrays of one checkpoint, read and checked
- failed_saves.py: why a save failed, in a few words
- run_checkpoints.py: save, verify and restore the checkpoints of a run
- loading.py: `load_model`, from a directory to a model
- stored_model.py: a stored model, read for export
"""
