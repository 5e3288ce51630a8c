"""Clusters that are not there: what a run would take on them (``frostline simulate``, docs/simulator.md)."""

from frostline.simulator.cluster import Cluster, Link, Part, Profile
from frostline.simulator.files import read_cluster, read_profile, read_trajectory
from frostline.simulator.model import PACKINGS, Simulation, Stage, compare_packings, simulate
from frostline.simulator.trajectory import Course, Move, Trajectory

__all__ = [
    "PACKINGS",
    "Cluster",
    "Course",
    "Link",
    "Move",
    "Part",
    "Profile",
    "Simulation",
    "Stage",
    "Trajectory",
    "compare_packings",
    "read_cluster",
    "read_profile",
    "read_trajectory",
    "simulate",
]
