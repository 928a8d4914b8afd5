"""Training recipes: what they take and give is torch's, so they work with any loop, ``Trainer`` or model."""

from fastseq.recipes.legw import LEGW, Schedule

__all__ = ["LEGW", "Schedule"]
