"""From a JSONL file to micro-batches: records -> samples -> rows (packing) -> batches.

Knows files, tokenizers and index arithmetic. Knows nothing of LoRA, of the model or of process groups: a data-parallel
rank is a number that it is given.
"""
