"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("stemtune")
except PackageNotFoundError:  # a checkout on sys.path that was never installed
    __version__ = "0+unknown"
