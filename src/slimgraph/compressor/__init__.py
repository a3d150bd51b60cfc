"""The Compressor of the documents: strategies from a YAML file, over one training."""
