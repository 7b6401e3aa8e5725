"""Text to batches: sources, tokenizers, checksummed token shards, packing, training and evaluation batches.

Files in reading order:

- batch.py: a batch of packed rows
- documents.py: a document, and the policy for bad ones
- files.py, records.py: the kind of a local file, and its records
- sources.py, dataset_sources.py, stdlib_corpus.py: sources of text
- synthetic_tasks.py: recall, copying, parity and S3, as a source and for evaluation
- scored.py: the tokens of a document that are scored
- spans.py: tokens with the bytes that they stand for
- conventions.py: BOS, end tokens and chat template of a model
- patterns.py: regular expressions that may take too long are refused
- plain_text.py, marks.py: text that gives no special tokens, and special tokens that text cannot imitate
- vocabulary.py, detokenization.py: bytes of ids, and ids to text
- tokenizers.py: text to ids
- templates.py, template_process.py, chat.py, conversations.py: chat templates and conversations
- config.py: `DataConfig`
- splitting.py: which text is held out
- lost_text.py: the part of a text that a tokenizer loses
- shards.py: ids on disk
- parts.py, locks.py: the output of a tokenizer, kept until all is complete; one process at a time
- encoding.py, preparation.py, provenance.py: shards are written once, found by hash, and recorded
- packing.py, left_out.py: documents to rows, and documents in no row
- pipeline.py: `batch(step)`
- windows.py: held-out text for evaluation
"""
