"""One file for each family of Hugging Face models: how its configuration, modules and tensors map to Megatron."""
