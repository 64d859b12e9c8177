"""Experiments of the family rules."""
