"""Training recipes: what they take and give is torch's, so they work with any loop, ``Trainer`` or model."""

from fastseq.recipes.lamb import LAMB
from fastseq.recipes.lars import LARS
from fastseq.recipes.layerwise import layerwise_groups
from fastseq.recipes.legw import LEGW, Schedule
from fastseq.recipes.legw_plan import plan

__all__ = ["LAMB", "LARS", "LEGW", "Schedule", "layerwise_groups", "plan"]
