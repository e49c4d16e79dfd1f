"""Tests that need a GPU and Transformer Engine; several ranks use NCCL where each has a GPU, else gloo on one."""
