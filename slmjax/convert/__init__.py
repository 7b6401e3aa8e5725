"""Import and export of models: Hugging Face directories and GGUF files. No code of theirs is ever run.

    import_model("SmolLM2-135M", "models/smollm2")               # then: slmjax.load_model("models/smollm2")
    export_model("runs/nano-1", "exported", to=Target.HF)

`hf_directory.py` and `gguf_model.py` read and write the two formats. A file under `families/` maps the
configuration and the tensors of one family; `family.py` has its building blocks. docs/add-a-family.md walks
through one.
"""
