"""Tables, ratios, targets and comparisons, computed from result rows."""
