"""What keeps a run: its folder, checkpoints, locks, metrics, progress, and what a file may name."""
