"""Durations of steps: the pace of a run and its time left (`pace.py`), and an estimate for a plan before it runs (`outlook.py`)."""
