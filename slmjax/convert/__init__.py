"""Models of other libraries and engines: Hugging Face directories and GGUF files, read and written."""
