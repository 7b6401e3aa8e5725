"""What a run records about itself: its directory, log, progress, throughput, profiles, trackers and pages.

Files in reading order:

- recorded_environment.py: what a result depends on besides its settings
- run_directory.py: files, log and times of a run
- messages.py: messages of modules, to the terminal and the log
- peak_memory.py: peak memory of devices and of the process
- meter.py: tokens per second, utilisation, waiting
- progress.py: the progress bar
- profiling.py: traces of a few steps
- trackers.py: TensorBoard, Weights & Biases and Trackio
- columns.py: tables of text for terminals and pipes
- report: pages for people
"""
