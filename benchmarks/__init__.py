"""Measurements behind the figures in the README: each script teaches itself with ``--help``."""
