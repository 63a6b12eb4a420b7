"""Training a network on simulated patterns, and judging it."""
