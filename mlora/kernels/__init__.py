"""Triton kernels of the fused path: passes over activations that do the low-rank work while the data is in registers.

None of them knows modules or autograd; :mod:`mlora.fused` calls them. Shapes: T tokens, N features, R the ranks of a linear's
projections together, p = R rounded up to a multiple of 64 (the width of the tail that carries the rank-R columns). Every kernel
is deterministic: sums over tokens are made in two stages, without atomics.
"""
