"""What `ray job submit` runs, one script per kind of work: `python -m workloads.NAME`."""
