"""Tasks: the data they read, how it is prepared for a model, and what is measured."""
