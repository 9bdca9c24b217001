"""launcher: training runs as jobs, on SLURM or on this machine. `python -m launcher --help`."""
