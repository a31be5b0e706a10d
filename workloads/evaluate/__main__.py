"""Entry point of `python -m workloads.evaluate`."""

from parallelmind import cli
from workloads.evaluate.command import main

if __name__ == "__main__":
    cli.run(main)
