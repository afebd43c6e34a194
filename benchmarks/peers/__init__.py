"""The loops that are measured. Each is a program: ``python -m benchmarks.peers.NAME JOB.json RESULT.json``."""
