"""The training loop and its input and output.

Files in reading order:

- token_count.py: scored targets, counted on the host
- setup.py: experiment, data, model and compiled steps before the first step
- resume.py: which run is resumed, and what changed since
- session_record.py: the history of a run, which a later session keeps
- launch.py: the run directory and its first files
- initial_state.py: fresh, imported or restored state
- changed_schedules.py: warnings of rates that jump in a resumed run
- quant_phases.py: phases of quantization within a run
- out_of_memory.py: errors with options that need less memory
- session.py: `open_session`, all that a session works with
- step_time.py: time and memory of a training, from a few steps on random tokens
- result.py: `Result`, how a run ended
- dry_run.py: `plan_run`, what a run would be
- trainer.py: `train`, the loop
- population_loop.py: the loop over the steps of a population
- population_pace.py: which experiments share a program, and whether that pays
- population.py: `train_population`, several runs in one program
"""
