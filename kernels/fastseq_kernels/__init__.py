"""Triton kernels of fastseq. Imports torch and triton, never fastseq."""
