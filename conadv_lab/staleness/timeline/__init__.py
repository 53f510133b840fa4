"""How long steps take on a cluster, how stale each attack is, and what the whole recipe costs. Needs no torch."""
