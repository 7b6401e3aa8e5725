"""Text to batches: sources, tokenizers, checksummed token shards, packing, the training pipeline, evaluation
windows.

documents.py: what a document is and what becomes of bad ones. files.py: what a local file is, and records.py
its records. sources.py, stdlib_corpus.py, dataset_sources.py: where text comes from. config.py: DataConfig.
tokenizers.py: text to ids, with vocabulary.py (bytes of ids) and conventions.py (BOS, ends and chat template
of a model). shards.py: ids on disk, with scored.py, which of them are scored. encoding.py and preparation.py
write shards, once, and find them again by hash. packing.py and pipeline.py make `batch(step)` of them,
batch.py is what they make, and windows.py cuts held-out text for evaluation. left_out.py says what rows leave
out.
"""
