"""The faults that `benchmarks/chaos.py` injects, and the oracles that judge them.

Files in reading order:

- sessions.py: commands in forked processes, with signals, limits and a hook for faults
- lab.py: small runs to break, the undisturbed reference, and the check that a run resumes to its bits
- verdicts.py: survived, refused or defect, and the rules for a clean refusal
- damage.py: random damage to bytes and to JSON
- signals.py: kinds "kill" and "signal"
- stored.py: kinds "checkpoint" and "small file"
- litter.py: kind "litter", foreign and misplaced files in a run
- disks.py: kind "disk", full and read-only file systems
- values.py: kind "non-finite"
- texts.py: kind "data", damaged shards, text and tokenizers
- processes.py: kind "processes", two on one machine
"""
