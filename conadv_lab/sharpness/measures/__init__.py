"""The measures of a report, each with its error, cost and conditions; ``front`` has `measure`."""
