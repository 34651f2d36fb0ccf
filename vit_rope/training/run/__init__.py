"""What a run consists of: folder, checkpoints, lock, metrics, progress, and trusted classes."""
