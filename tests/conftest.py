"""Settings for all tests."""

import os

# one thread per process: tests run in parallel, and threads that wait for busy cores stall
os.environ["OMP_NUM_THREADS"] = "1"
