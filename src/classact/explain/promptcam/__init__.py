"""Prompt-CAM: one learned prompt per class in a frozen vision transformer, whose attention shows the class's traits.

Chowdhury, Paul, Mai, Gu, Zhang, Mehrab, Campolongo, Rubenstein, Stewart, Karpatne, Berger-Wolf, Su, Chao: Prompt-CAM:
Making Vision Transformers Interpretable for Fine-Grained Analysis, CVPR 2025, https://arxiv.org/abs/2501.09333.
Authors' code: https://github.com/Imageomics/Prompt_CAM.

``model`` has the network, its explanation and the ranking of heads; ``lit`` has the training of the authors.
"""

from classact.explain.promptcam.model import (
    HeadRanking,
    PromptCAM,
    PromptCAMExplainer,
    PromptCAMOutput,
    rank_heads,
)

__all__ = [
    "HeadRanking",
    "PromptCAM",
    "PromptCAMExplainer",
    "PromptCAMOutput",
    "rank_heads",
]
