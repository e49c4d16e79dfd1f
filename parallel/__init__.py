"""Groups, shards, stages and collectives on Megatron-Core. Nothing in this package has heard of LoRA."""
