"""Recipes: compositions of transforms and algorithms for a loss, parameters and batches."""
