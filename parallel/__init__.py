"""Groups, shards, stages and collectives on Megatron-Core. Nothing in this package knows what they are used for."""
