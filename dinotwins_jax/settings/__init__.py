"""Checks and automatic values for config keys. No JAX is imported here."""
