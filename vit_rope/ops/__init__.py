"""Rotating channel pairs near the speed of copying them. This layer knows torch and no position scheme."""
