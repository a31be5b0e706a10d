"""Entry point of `python -m workloads.generate`."""

from parallelmind import cli
from workloads.generate.command import main

if __name__ == "__main__":
    cli.run(main)
