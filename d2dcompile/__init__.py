"""Dense transformers to dynamic-k Mixture-of-Experts (D2DMoE), as a torch.compile backend.

    import d2dcompile as d2d

    conversion = d2d.convert(model, batches)         # split FFNs into experts, fit routers, attach
    fast = torch.compile(model, backend="d2dmoe")    # run chosen experts only
    d2d.set_tau(model, 0.2)                          # quality against cost, without recompiling

Szatkowski, Wojcik, Piorczynski, Scardapane: Exploiting Activation Sparsity with Dense to Dynamic-k
Mixture-of-Experts Conversion, NeurIPS 2024, arXiv:2310.04361.
"""

from . import errors
from .attachment import attach, detach
from .config import Config
from .conversion import convert
from .explaining import Report, explain
from .finetuning import Finetuning, finetune
from .ir import Conversion, Experts, Miss, Plan, Site
from .measuring import SiteStats, Stats, measure
from .projecting import replace_projections
from .reading import load
from .relufying import Relufied, relufy
from .replaced import Replaced, load_projections
from .rewriting import rewrite
from .setting import set_rule, set_tau
from .solving import fit_tau
from .sparsifying import SiteSparsity, Sparsifier, sparsify
from .tuning import tune

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Conversion",
    "Experts",
    "Finetuning",
    "Miss",
    "Plan",
    "Relufied",
    "Replaced",
    "Report",
    "Site",
    "SiteSparsity",
    "SiteStats",
    "Sparsifier",
    "Stats",
    "attach",
    "convert",
    "detach",
    "errors",
    "explain",
    "finetune",
    "fit_tau",
    "load",
    "load_projections",
    "measure",
    "relufy",
    "replace_projections",
    "rewrite",
    "set_rule",
    "set_tau",
    "sparsify",
    "tune",
]
