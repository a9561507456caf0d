"""Where runs are carried out: on this machine, under torchrun, by SLURM, by Ray."""
