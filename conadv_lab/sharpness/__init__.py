"""Curvature and sharpness of any model."""
