"""``python -m frostline``: the command line of the interpreter at hand, whatever is on the path."""

from frostline.cli import main

main()
