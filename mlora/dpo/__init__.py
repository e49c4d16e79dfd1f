"""Direct preference optimisation: pairs of answers as data, and the loss that prefers one to the other.

What rows, batches and the trainer are is said in :mod:`mlora.sft` and :mod:`mlora.train`; a pair is two rows that stay together.
"""
