"""Import and export of models: Hugging Face directories and GGUF files. No code of theirs is ever run.

    import_model("SmolLM2-135M", "models/smollm2")               # then: slmjax.load_model("models/smollm2")
    export_model("runs/nano-1", "exported", to=Target.HF)

docs/add-a-family.md explains a file of `families/`.

Files in reading order:

- settings.py: a foreign configuration, in which no key is ignored silently
- family.py: building blocks of a family's file
- hf: keys and tensor names of Hugging Face models
- gguf: GGUF files
- families: one file for each family, its configuration and its tensors
- folding.py: multipliers as part of weights
- source.py: a foreign model, whatever its format
- hf_directory.py: Hugging Face directories
- gguf_model.py: a model in a GGUF file
- model_card.py: the model card of an export
- import_export.py: `import_model` and `export_model`
- slicing.py: smaller models out of nested ones
- verify: exported files checked in other engines
"""
