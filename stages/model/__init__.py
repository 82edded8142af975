"""The model as the hub names it: its folder, its modules, and where their weights lie in the checkpoint."""
