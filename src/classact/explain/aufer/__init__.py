"""Guided interpretable facial expression recognition: align a layer's attention with the action units of a face.

Belharbi, Pedersoli, Koerich, Bacon, Granger: Guided Interpretable Facial Expression Recognition via Spatial Action Unit
Cues, FG 2024, https://arxiv.org/abs/2402.00281. Authors' code (MIT): https://github.com/sbelharbi/interpretable-fer-aus.

A codebook says which facial action units (AUs) belong to an expression, landmarks say where they are in this face.
From both a heatmap A is drawn ([`AUHeatmap`][classact.explain.AUHeatmap]); in training the attention T of a layer, the
mean of its channels, is pushed to look like it ([`SpatialAlignmentLoss`][classact.explain.SpatialAlignmentLoss]):
``L = cross-entropy + lambda * (1 - cos(T, A))``. Nothing changes at test time; A knows the true label, so it is a
target and a yardstick, never an input of the model. The loss takes any spatial prior, any named layer, CNN or ViT.
"""
