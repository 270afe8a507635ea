'''The command line: type a command, get files.

Commands prune a network from torchvision, timm or a file of the user's on a folder of images; this room may import all
others, and none imports it.
Start with ``_options.py``, which says what may be typed, then ``_commands.py``, which does it.
'''
from ._cli import main as main
