"""Vector spaces of parameter trees: whole vectors, or vectors divided among ranks."""
