"""What all tests share."""

import os

# one thread for each process: tests run side by side, and threads that wait for each other's cores stall
os.environ["OMP_NUM_THREADS"] = "1"
