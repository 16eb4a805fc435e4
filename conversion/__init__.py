"""Many checkpoints, one file each, without a server: what `convert.py` runs, by the nodes' own code."""
