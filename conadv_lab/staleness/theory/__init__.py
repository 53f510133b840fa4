"""A bound on training with stale attacks, beside what is measured on a problem whose constants are known."""
