"""Benchmarks: run times and peak memory as ratios to a reference, measured in one process.

`vit-rope bench TOPIC` runs the function `bench` of the module of that name. Candidates run
alternately and are divided within each round, so that other load on the machine affects all of them
alike. On a CPU with one thread, times are CPU time of the process; on a GPU, CUDA events measure
them. Results are medians with quartiles. No test asserts a time.
"""
