"""Checkpoints that are quantized already, presented as the plain tensors that they stand for."""
