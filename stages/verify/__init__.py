"""Proof that a checkpoint is what engines will ask for: of any checkpoint, from its files alone."""
