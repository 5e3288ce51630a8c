"""Adapters to training loops: thin, no logic of their own. Import the one you need; each needs its own extra."""
