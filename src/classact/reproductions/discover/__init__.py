"""Experiments of the family nn."""
