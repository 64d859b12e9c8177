"""PPGN: plug and play generative networks, https://arxiv.org/abs/1612.00005.

``sampler`` has the five samplers and what they are made of; ``networks`` and ``training`` make a generator for them.
"""
