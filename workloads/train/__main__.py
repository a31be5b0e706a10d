"""`python -m workloads.train`."""

from parallelmind import cli
from workloads.train.command import main

if __name__ == "__main__":
    cli.run(main)
