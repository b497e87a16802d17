"""Experiments: quality against cost, one script each. `python -m experiments.digits --quick`."""
