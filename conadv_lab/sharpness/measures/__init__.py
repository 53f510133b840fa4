"""The numbers of a report, each with its error, price and conditions; ``front`` has `measure`."""
