"""What a method is, what it may cost, and when which part of it trains."""
