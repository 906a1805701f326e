"""This covey's version."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("covey")
except PackageNotFoundError:  # run from a checkout that is not installed
    VERSION = "0+checkout"
