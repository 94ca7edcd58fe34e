"""Parts of tools/parity.py: the experiment, a worker for one backend, the comparison, the plot."""
