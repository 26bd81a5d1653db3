"""RoSA on a real model and data made up here."""
