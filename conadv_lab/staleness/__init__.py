"""What a stale attack costs, and what it buys."""
