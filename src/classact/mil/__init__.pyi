from .acmil import ACMIL, ACMILLoss, ACMILOutput, MultiBranchAttention, attention_diversity, stochastic_topk_mask
from .aem import AttentionEntropy, Subsample, attention_entropy, effective_instances, sweep_entropy_weight
from .attention import (
    ABMIL,
    AttentionPool,
    MultiHeadABMIL,
    MultiHeadAttentionPool,
    MultiHeadOutput,
    attention_concentration,
)
from .lit import LitMIL
from .model import BagCrossEntropy, MILLoss, MILModel, MILOutput, Standardized
from .pooling import MaxMIL, MeanMIL, PooledLogistic

__all__ = [
    "ABMIL",
    "ACMIL",
    "ACMILLoss",
    "ACMILOutput",
    "AttentionEntropy",
    "AttentionPool",
    "BagCrossEntropy",
    "LitMIL",
    "MILLoss",
    "MILModel",
    "MILOutput",
    "MaxMIL",
    "MeanMIL",
    "MultiBranchAttention",
    "MultiHeadABMIL",
    "MultiHeadAttentionPool",
    "MultiHeadOutput",
    "PooledLogistic",
    "Standardized",
    "Subsample",
    "attention_concentration",
    "attention_diversity",
    "attention_entropy",
    "effective_instances",
    "stochastic_topk_mask",
    "sweep_entropy_weight",
]
