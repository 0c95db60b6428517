"""Heads: small networks on features, for the tasks of the neighbouring systems."""
