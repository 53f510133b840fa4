"""Curvature operators: the Hessian and its relatives, with fixes for derivatives that torch gets wrong."""
