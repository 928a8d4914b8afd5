"""Training recipes: what they take and give is torch's, so they work with any loop, ``Trainer`` or model."""

from fastseq.recipes import attacks
from fastseq.recipes.adt import ADT
from fastseq.recipes.adt_generator import LatentEncoder, PerturbationGenerator
from fastseq.recipes.lamb import LAMB
from fastseq.recipes.lars import LARS
from fastseq.recipes.layerwise import layerwise_groups
from fastseq.recipes.legw import LEGW, Schedule
from fastseq.recipes.legw_plan import plan
from fastseq.recipes.task_distance import distances_figure, task_distance, task_distances
from fastseq.recipes.tawt import TaskWeights, mirror_step, probe, sample_signals
from fastseq.recipes.tawt_training import joint, normalized_joint, pretraining
from fastseq.recipes.threat import Threat

__all__ = [
    "ADT",
    "LAMB",
    "LARS",
    "LEGW",
    "LatentEncoder",
    "PerturbationGenerator",
    "Schedule",
    "TaskWeights",
    "Threat",
    "attacks",
    "distances_figure",
    "joint",
    "layerwise_groups",
    "mirror_step",
    "normalized_joint",
    "plan",
    "pretraining",
    "probe",
    "sample_signals",
    "task_distance",
    "task_distances",
]
