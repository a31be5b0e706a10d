"""`python -m workloads.convert`."""

from parallelmind import cli
from workloads.data.convert import main

if __name__ == "__main__":
    cli.run(main)
