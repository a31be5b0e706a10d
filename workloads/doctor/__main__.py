"""`python -m workloads.doctor`. Missing libraries of the command line itself are reported in one line."""

import sys

try:
    from parallelmind import cli
    from workloads.doctor.command import main
except ModuleNotFoundError as error:
    sys.exit(
        f"FAIL  libraries   {error.name} is missing; "
        "run `make setup`, or pip install -e . in the project's folder"
    )

if __name__ == "__main__":
    cli.run(main)
