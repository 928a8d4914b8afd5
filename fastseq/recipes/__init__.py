"""Training recipes: what they take and give is torch's, so they work with any loop, ``Trainer`` or model."""

from fastseq.recipes import attacks
from fastseq.recipes.adt import ADT
from fastseq.recipes.adt_generator import LatentEncoder, PerturbationGenerator
from fastseq.recipes.lamb import LAMB
from fastseq.recipes.lars import LARS
from fastseq.recipes.layerwise import layerwise_groups
from fastseq.recipes.legw import LEGW, Schedule
from fastseq.recipes.legw_plan import plan
from fastseq.recipes.threat import Threat

__all__ = [
    "ADT",
    "LAMB",
    "LARS",
    "LEGW",
    "LatentEncoder",
    "PerturbationGenerator",
    "Schedule",
    "Threat",
    "attacks",
    "layerwise_groups",
    "plan",
]
