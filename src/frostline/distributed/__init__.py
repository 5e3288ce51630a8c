"""Many ranks: for now, the simulator of clusters that are not there (``frostline simulate``)."""

from frostline.distributed.cluster import Cluster, Link, Part, Profile
from frostline.distributed.files import read_cluster, read_profile, read_trajectory
from frostline.distributed.simulator import PACKINGS, Simulation, Stage, compare_packings, simulate
from frostline.distributed.trajectory import Course, Move, Trajectory

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
