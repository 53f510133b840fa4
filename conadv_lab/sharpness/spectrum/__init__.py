"""Eigenvalues, trace and density of a matrix that can only be multiplied with."""
