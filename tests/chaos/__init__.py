"""The promises under load, faults and the death of processes: `python -m tests.chaos`."""
