"""One thread for each test process: tests run side by side, and threads that wait for each other's cores stall."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
