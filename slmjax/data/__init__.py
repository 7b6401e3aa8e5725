"""Text to batches: sources, tokenizers, checksummed token shards, packing, training and evaluation batches.

documents.py: a document, and the policy for bad ones. files.py: the kind of a local file; records.py: its
records. sources.py, stdlib_corpus.py, dataset_sources.py: sources of text. config.py: DataConfig.
tokenizers.py: text to ids, with vocabulary.py (bytes of ids) and conventions.py (BOS, end tokens and chat
template of a model). shards.py: ids on disk; scored.py: which of them are scored. encoding.py and
preparation.py write shards once and find them again by hash. packing.py and pipeline.py make `batch(step)` of
them, batch.py is a batch, and windows.py cuts held-out text for evaluation. left_out.py reports text that is
in no row.
"""
