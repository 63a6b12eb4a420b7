"""The networks: layers, models, and the loader of their weights."""
