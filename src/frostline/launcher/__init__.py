"""Starting a recipe on several ranks: torch's elastic agent, once for each stage of the run."""

from frostline.launcher.supervisor import Hosts, launch

__all__ = ["Hosts", "launch"]
