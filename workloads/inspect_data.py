"""`python -m workloads.inspect_data`."""

from parallelmind import cli
from workloads.data.inspect import main

if __name__ == "__main__":
    cli.run(main)
