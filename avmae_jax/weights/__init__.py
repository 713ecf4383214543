"""A conversion of someone else's weights is a table of rows, and one function that applies tables."""
