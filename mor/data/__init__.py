"""Text to training batches: tokenizers, sources of documents, token shards and the packing loader."""
