"""Step times on a cluster, the staleness of each attack, and the cost of the whole recipe. Does not need torch."""
