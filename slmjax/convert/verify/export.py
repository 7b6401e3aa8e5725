"""Whether an exported file is the model that was trained: bytes, matrix products, loss and tokenizer, in the
engine that will run it.

    found = verify_export("runs/nano", "nano.gguf")
    found.holds, found.loss.difference, found.loss.floor

Four levels. Bytes: every tensor of the file decodes to exactly the numbers that the model multiplies with.
Products: with the engine's own kernels, each matrix gives what ours gives, but for sums in another order,
where inputs have the same codes; and it is counted how many of those codes differ. Loss: over the same tokens
both find the same mean negative log-likelihood, as far as that can be told. Rounding inputs to 8 bits turns a
difference in the last bit of a sum into one of a whole code, here and there, and so a network that does it
answers to the smallest noise: what noise of 1e-6 on the embeddings does to our own loss is measured, and is
the floor below which nothing can be told. Tokenizer: the file has the vocabulary, the special tokens and the
chat template of the model, and the engine gives the ids that the model was trained on.

Dims: T tokens of a window, V vocabulary, R rows of inputs, I inputs of a matrix, O its outputs.
"""

import dataclasses
from pathlib import Path

from slmjax.checkpoints import loading
from slmjax.checkpoints.stored_model import LocalModel, open_local_model
from slmjax.convert.family import BoundRule, bind
from slmjax.convert.gguf import llama_cpp
from slmjax.convert.gguf.container import GgufFile, read_gguf
from slmjax.convert.gguf_model import EXTRA_TENSORS, TOLERANCE, described
from slmjax.convert.verify.file_checks import (
    INPUT_SPECS,
    ProductCheck,
    TensorCheck,
    check_products,
    check_tensor,
    input_type,
    is_multiplied_with,
)
from slmjax.convert.verify.loss_check import LossCheck, check_loss, engine_context, text_windows
from slmjax.convert.verify.tokenizer_check import TokenizerCheck, compare_ids, compare_metadata
from slmjax.data.config import DataConfig
from slmjax.data.provenance import ChangedData
from slmjax.formats.spec import QuantSpec
from slmjax.models.canonical_form import canonical, differences

DEFAULT_TOKENS = 512
DEFAULT_WINDOW = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """What comparing a file with the model it was made of came to."""

    file: str
    run: str
    step: int | None  # of the run
    changed_rows: (
        tuple[int, int] | None
    )  # of codes, and all rows: those that differ on the devices that it was trained on, where known
    engine: str  # and its version
    settings: tuple[str, ...]  # that the file has otherwise than the model
    extra: tuple[str, ...]  # tensors of the file that the model has no place for
    tensors: tuple[TensorCheck, ...]
    products: tuple[ProductCheck, ...]
    loss: (
        LossCheck | None
    )  # None: the file is of another model, or has a vocabulary of another kind, and was not run
    tokenizer: TokenizerCheck

    @property
    def bytes_hold(self) -> bool:
        """Level one."""
        return not self.settings and not self.extra and all(one.holds for one in self.tensors)

    @property
    def products_hold(self) -> bool:
        """Level two."""
        return all(one.holds for one in self.products)

    @property
    def holds(self) -> bool:
        """All four levels."""
        return (
            self.bytes_hold
            and self.products_hold
            and self.loss is not None
            and self.loss.holds
            and self.tokenizer.holds
        )


def verify_export(
    run: str | Path,
    file: str | Path,
    *,
    data: DataConfig | None = None,
    max_tokens: int = DEFAULT_TOKENS,
    window: int = DEFAULT_WINDOW,
    step: int | None = None,
    changed_data: ChangedData = ChangedData.REFUSE,
) -> Verification:
    """Compares a GGUF file with the model that it was made of, in llama.cpp.

    Args:
      run: the run directory, or that of an imported or quantized model.
      file: what `export` wrote.
      data: the text for the losses: its held-out part, or all of it where nothing is held out. None: the
        held-out text of the run.
      max_tokens: of the text, the first so many.
      window: tokens that are scored in one go, each seeing those before it.
      step: of a run, the checkpoint; None for the newest.
      changed_data: what to do where the run's text has changed since training.

    Raises:
      ValueError: one of the two cannot be read, the run's text has changed, or there is no text or no engine.
    """
    run = Path(run)
    file = Path(file)
    engine = llama_cpp.import_engine()
    own = open_local_model(run, step=step)
    content = read_gguf(file)
    loaded = loading.load_model(run, step=own.step)
    windows = text_windows(loaded, data, max_tokens=max_tokens, length=window, changed_data=changed_data)
    wanted = canonical(own.config)
    family, found = described(file, content)
    bound = bind(family.table_of(wanted), wanted)
    known = {one.theirs[0] for one in bound} | {f"{name}.weight" for name in EXTRA_TENSORS}
    settings = tuple(differences(wanted, canonical(found), tolerance=TOLERANCE))
    extra = tuple(sorted(set(content.tensors) - known))
    tensors = tuple(check_tensor(one, own, content.tensors.get(one.theirs[0])) for one in bound)
    is_other = bool(settings or extra) or any(one.is_missing for one in tensors)
    words = compare_metadata(
        content.metadata, own.path / "tokenizer", loaded.tokenizer, num_rows=wanted.known_vocab_size
    )
    loss = None
    if not is_other and words.can_load:
        loss = check_loss(loaded, file, windows, input_specs=_input_specs(bound, own, content))
        words = compare_ids(words, file, loaded.tokenizer, context=engine_context(windows))
    return Verification(
        file=str(file),
        run=str(run),
        step=own.step,
        changed_rows=own.changed_rows,
        engine=f"llama.cpp in xllamacpp {engine.__version__}",
        settings=settings,
        extra=extra,
        tensors=tensors,
        products=() if is_other else tuple(check_products(bound, own, content.tensors)),
        loss=loss,
        tokenizer=words,
    )


def _input_specs(bound: list[BoundRule], own: LocalModel, content: GgufFile) -> dict[str, QuantSpec]:
    """By logical path of a weight, how the engine rounds what it is multiplied with."""
    found: dict[str, QuantSpec] = {}
    for one in bound:
        tensor = content.tensors.get(one.theirs[0])
        if (
            tensor is None
            or len(tensor.shape) < 2
            or not is_multiplied_with(tensor.name, tuple(content.tensors))
        ):
            continue
        if (spec := INPUT_SPECS.get(input_type(tensor.type))) is not None:
            found |= dict.fromkeys(one.ours, spec)
    return found
