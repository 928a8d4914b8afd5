"""Measurements of fastseq against its rivals: ``python -m benchmarks.run lstm``."""
