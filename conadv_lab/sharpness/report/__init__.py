"""Reports as a page, tables and figures, compared with one another and with PyHessian."""
