"""`python -m workloads.sweep`."""

from parallelmind import cli
from workloads.sweep.command import main

if __name__ == "__main__":
    cli.run(main)
