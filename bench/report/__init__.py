"""What result rows say: tables, ratios, targets, comparisons."""
