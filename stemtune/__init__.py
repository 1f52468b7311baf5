"""stemtune: crystal orientations from STEM diffraction patterns, by the best network a cluster can find.

Importing the package loads neither torch nor ray, so that the command line answers at once.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("stemtune")
except PackageNotFoundError:  # a checkout on sys.path that was never installed
    __version__ = "0+unknown"
