"""How parameters and densities move towards a minimum."""
