"""What modelopt says: recipes, the quantizers they place on a model, and the solver they ask for."""
