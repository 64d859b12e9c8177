from .afkan import AFKAN, AFKANLayer, ReLUKAN, ReLUKANLayer, af_basis, relu_kan_basis
from .afkan_lit import AFKANClassifier
from .crrelu import (
    Activation,
    CRReLU,
    EAFOActivation,
    GaussianDensity,
    GridDensity,
    crrelu,
    eafo_correction,
    eafo_step,
    entropy_of,
    wafbc,
)
from .evonorm.graph import GraphNormAct, LayerGraph
from .evonorm.layers import EvoNorm2d, evonorm_b0, evonorm_b1, evonorm_b2, evonorm_s0, evonorm_s1, evonorm_s2
from .evonorm.pairs import replace_norm_act
from .evonorm.rejection import quality_test, stability_test, static_test
from .evonorm.search import SearchResult, evolve_layers
from .kan_bases import KANConv2d, KANLinear, kan_basis
from .karat.analyses import attention_maps, attention_spectrum, loss_landscape, weight_distributions
from .karat.attention import KArAttention, attention_transfer, karat_vit
from .karat.operator import LearnableRowOperator, simplex_projection
from .selective_scan import selective_scan
from .skan import SKAN, GroupedKANConv2d, GroupedKANLinear, SKANConv2d, SKANLinear, fit_skan
from .skan_estimators import SKANClassifier, SKANRegressor
from .skan_lit import SKANModule
from .swap import Replacement, replace

__all__ = [
    "AFKAN",
    "SKAN",
    "AFKANClassifier",
    "AFKANLayer",
    "Activation",
    "CRReLU",
    "EAFOActivation",
    "EvoNorm2d",
    "GaussianDensity",
    "GraphNormAct",
    "GridDensity",
    "GroupedKANConv2d",
    "GroupedKANLinear",
    "KANConv2d",
    "KANLinear",
    "KArAttention",
    "LayerGraph",
    "LearnableRowOperator",
    "ReLUKAN",
    "ReLUKANLayer",
    "Replacement",
    "SKANClassifier",
    "SKANConv2d",
    "SKANLinear",
    "SKANModule",
    "SKANRegressor",
    "SearchResult",
    "af_basis",
    "attention_maps",
    "attention_spectrum",
    "attention_transfer",
    "crrelu",
    "eafo_correction",
    "eafo_step",
    "entropy_of",
    "evolve_layers",
    "evonorm_b0",
    "evonorm_b1",
    "evonorm_b2",
    "evonorm_s0",
    "evonorm_s1",
    "evonorm_s2",
    "fit_skan",
    "kan_basis",
    "karat_vit",
    "loss_landscape",
    "quality_test",
    "relu_kan_basis",
    "replace",
    "replace_norm_act",
    "selective_scan",
    "simplex_projection",
    "stability_test",
    "static_test",
    "wafbc",
    "weight_distributions",
]
