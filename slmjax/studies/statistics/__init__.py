"""The statistics of studies, on plain numbers: no experiment and no run is known here.

Files in reading order:

- samples.py: summaries, paired differences, bootstrap intervals, Holm's correction
- ratios.py: ratios with intervals
- results_table.py: arms by seeds, and the rules of verdicts
- two_way.py: noise pooled over arms and seeds, and noisy arms
- paired_differences.py: paired differences of a table, and tests on them
- power.py: effects that a number of seeds resolves, and seeds that an effect takes
- sequential.py: levels of fixed looks
- power_of_rules.py: power as the rules of a study judge, at fixed looks
- verdicts.py: verdicts on comparisons
- proportions.py: exact intervals of proportions
- documents.py: uncertainty by seeds and by held-out documents
- speedup.py: effective speed-up and trends over sizes
- ladders.py: a question at several sizes
- campaigns.py: false discoveries over many studies
"""
