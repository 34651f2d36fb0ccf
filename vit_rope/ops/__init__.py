"""Rotation of channel pairs, nearly as fast as copying. It depends on no position scheme."""
