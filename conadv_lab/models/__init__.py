"""Networks, and mixture batch norm for any network."""
