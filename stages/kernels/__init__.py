"""Triton kernels: what runs once per token, weight or candidate, fused for a GPU.

Each does what a torch function elsewhere does, which stays the definition and runs on a CPU; the function of
the same purpose calls it for tensors on a GPU. They are imported there and then, since builds of torch for
CPUs come without Triton. Floating point is contracted nowhere (`enable_fp_fusion=False`), so that rounding
decisions are torch's.
"""
