"""Sending runs to SLURM or to this machine. Knows folders and submitit; `worker` alone knows training."""
