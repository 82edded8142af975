"""What a person touches: the command line, its progress and tables, and the demo."""
