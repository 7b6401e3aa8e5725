"""Models from elsewhere and to elsewhere: Hugging Face directories and GGUF files, none of whose code is ever
run.

    import_model("SmolLM2-135M", "models/smollm2")               # then: slmjax.load_model("models/smollm2")
    export_model("runs/nano-1", "exported", to=Target.HF)

`hf.py` and `gguf.py` know the two formats; a file under `families/` says of one family how its configuration
and its tensors are called there; `family.py` is what such a file is written with. docs/add-a-family.md walks
through one.
"""
