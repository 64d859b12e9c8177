"""Experiments of the family explain."""
