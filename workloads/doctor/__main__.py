"""`python -m workloads.doctor`."""

from parallelmind import cli
from workloads.doctor.command import main

if __name__ == "__main__":
    cli.run(main)
