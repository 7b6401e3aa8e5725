"""The training loop and its input and output.

Files in reading order:

- session.py: experiment, data, model and compiled step before the first step
- resume.py: which run is resumed, and what changed since
- launch.py: the run directory and its first files
- initial_state.py: fresh, imported or restored state
- changed_schedules.py: warnings of rates that jump in a resumed run
- quant_phases.py: phases of quantization within a run
- out_of_memory.py: errors with options that need less memory
- trainer.py: `train`, the loop
"""
