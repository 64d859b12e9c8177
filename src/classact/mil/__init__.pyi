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
from .clam import CLAMSB, CLAMLoss, CLAMOutput, smooth_top1_svm
from .dsmil import DSMIL, DSMILLoss, DSMILOutput
from .lit import LitMIL
from .model import BagCrossEntropy, MILLoss, MILModel, MILOutput, Standardized
from .pooling import MaxMIL, MeanMIL, PooledLogistic
from .transmil import PPEG, NystromAttention, TransMIL, iterative_pinv

__all__ = [
    "ABMIL",
    "ACMIL",
    "CLAMSB",
    "DSMIL",
    "PPEG",
    "ACMILLoss",
    "ACMILOutput",
    "AttentionEntropy",
    "AttentionPool",
    "BagCrossEntropy",
    "CLAMLoss",
    "CLAMOutput",
    "DSMILLoss",
    "DSMILOutput",
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
    "NystromAttention",
    "PooledLogistic",
    "Standardized",
    "Subsample",
    "TransMIL",
    "attention_concentration",
    "attention_diversity",
    "attention_entropy",
    "effective_instances",
    "iterative_pinv",
    "smooth_top1_svm",
    "stochastic_topk_mask",
    "sweep_entropy_weight",
]
