"""What runs came to: their figures, and several methods compared."""
