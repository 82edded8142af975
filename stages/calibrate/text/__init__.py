"""DATA as a person gives it, to the matrix of token windows."""
