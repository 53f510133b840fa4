"""Reports as a page, tables and figures, compared with each other and with PyHessian."""
