"""How the weights that are made here are made."""
