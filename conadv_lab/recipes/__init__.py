"""Recipes: Python functions that return a config."""
