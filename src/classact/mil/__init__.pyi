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
from .imbalance import CosineClassifier, FocalLoss, LDAMLoss, LogitAdjustment, make_imbalanced
from .lit import LitMIL
from .mambamil import (
    DiscreteHazards,
    MambaBlock,
    MambaMIL,
    NLLSurvivalLoss,
    SelectiveSSM,
    discrete_hazards,
    raster_order,
    sequence_reorder,
    survival_bins,
)
from .mhim import MHIM, consistency_loss, fit_mhim, hard_instance_mask, load_mhim_v1_checkpoint
from .model import BagCrossEntropy, MILLoss, MILModel, MILOutput, Standardized
from .pooling import MaxMIL, MeanMIL, PooledLogistic
from .sampler import BalancedBagSampler
from .scmil import SCMIL, SCMILLoss, SCMILOutput, curriculum_weight, fit_decoupled, supervised_contrastive_loss
from .transmil import PPEG, NystromAttention, TransMIL, iterative_pinv

__all__ = [
    "ABMIL",
    "ACMIL",
    "CLAMSB",
    "DSMIL",
    "MHIM",
    "PPEG",
    "SCMIL",
    "ACMILLoss",
    "ACMILOutput",
    "AttentionEntropy",
    "AttentionPool",
    "BagCrossEntropy",
    "BalancedBagSampler",
    "CLAMLoss",
    "CLAMOutput",
    "CosineClassifier",
    "DSMILLoss",
    "DSMILOutput",
    "DiscreteHazards",
    "FocalLoss",
    "LDAMLoss",
    "LitMIL",
    "LogitAdjustment",
    "MILLoss",
    "MILModel",
    "MILOutput",
    "MambaBlock",
    "MambaMIL",
    "MaxMIL",
    "MeanMIL",
    "MultiBranchAttention",
    "MultiHeadABMIL",
    "MultiHeadAttentionPool",
    "MultiHeadOutput",
    "NLLSurvivalLoss",
    "NystromAttention",
    "PooledLogistic",
    "SCMILLoss",
    "SCMILOutput",
    "SelectiveSSM",
    "Standardized",
    "Subsample",
    "TransMIL",
    "attention_concentration",
    "attention_diversity",
    "attention_entropy",
    "consistency_loss",
    "curriculum_weight",
    "discrete_hazards",
    "effective_instances",
    "fit_decoupled",
    "fit_mhim",
    "hard_instance_mask",
    "iterative_pinv",
    "load_mhim_v1_checkpoint",
    "make_imbalanced",
    "raster_order",
    "sequence_reorder",
    "smooth_top1_svm",
    "stochastic_topk_mask",
    "supervised_contrastive_loss",
    "survival_bins",
    "sweep_entropy_weight",
]
