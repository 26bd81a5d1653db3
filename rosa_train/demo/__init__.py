"""The demo: RoSA on a real model, with generated data."""
