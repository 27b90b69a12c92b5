"""Devices and processes: placement of arrays, sharding, compilation, memory pages."""
