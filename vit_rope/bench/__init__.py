"""Speed as ratios, measured side by side in one process; `vit-rope bench` runs it.

Candidates run alternately and are divided within each round, so that other work on the machine affects all of them
alike. On a CPU with one thread the clock counts this process's own time, on a GPU events do. Medians come with
quartiles; no test asserts a time.
"""
