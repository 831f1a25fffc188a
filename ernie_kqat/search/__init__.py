"""A search over config keys: which values give the most accuracy, for each size."""
