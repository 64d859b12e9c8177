"""Experiments of the multiple-instance papers."""
