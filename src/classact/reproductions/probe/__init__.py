"""Experiments of the family probe."""
