"""A bound on training with stale attacks, compared with measurements on a problem with known constants."""
