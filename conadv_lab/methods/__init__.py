"""How one step's gradient is made."""
