"""From raw text to batches of tokens.

sources    reads documents from files, folders and the running Python
documents  splits them by content hash and stores each split's text with its signals
tokenizer  trains byte-level BPE, known by the hash of its file
shards     stores tokens, memory-mapped, with the tokenizer's hash in their header
loader     draws training batches: a pure function of (seed, position, weights)
corpus     puts them together for the `data` section of a recipe
cache      where all of it is kept: by content, written once, safe between processes
"""
