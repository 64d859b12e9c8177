"""Kolmogorov-Arnold attention: learnable functions of the scores in place of softmax, and analyses of what they do."""
