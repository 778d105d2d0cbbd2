"""Faults thrown at real runs, to see that none of them is lost; `scripts/faults.py` starts it."""
