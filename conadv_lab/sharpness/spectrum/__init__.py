"""Eigenvalues, trace and density of a matrix known only through products with vectors."""
