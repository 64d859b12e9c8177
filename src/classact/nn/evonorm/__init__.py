"""EvoNorm: normalisation and activation as one layer, and the search that found it, https://arxiv.org/abs/2004.02967.

``layers`` has the six layers of the paper, ``pairs`` puts them into a network in place of norm and activation.
``graph`` has the search space and a layer that computes any graph of it, ``rejection`` the tests that discard most
graphs, and ``search`` the evolution.
"""
