"""Comparison of an exported file with the trained model, in the engine that will run it.

    verification = verify_export("runs/nano", "nano.gguf")
    verification.holds, verification.loss.difference, verification.loss.floor

There are four levels:

1. Bytes: every tensor of the file dequantizes to exactly the model's weights.
2. Products: for equal activation codes, the engine's kernels give the same matrix products up to the order of
   summation; activation codes that differ are counted.
3. Loss: the mean negative log-likelihood over the same tokens agrees within a measured tolerance. A network
   that rounds activations to 8 bits turns a difference in the last bit of a sum into a different code now and
   then, and so amplifies the smallest noise. The effect of noise of 1e-6 on the embeddings is measured on our
   own loss: it is the floor, below which differences mean nothing.
4. Tokenizer: the file has the model's vocabulary, special tokens and chat template, and the engine encodes
   texts to the same ids.
"""

import dataclasses
from pathlib import Path

from slmjax.checkpoints import loading
from slmjax.checkpoints.stored_model import LocalModel, open_local_model
from slmjax.convert.family import BoundRule, bind
from slmjax.convert.folding import folded
from slmjax.convert.gguf import llama_cpp
from slmjax.convert.gguf.container import GgufFile, read_gguf
from slmjax.convert.gguf_model import EXTRA_TENSORS, TOLERANCE, family_and_config
from slmjax.convert.verify.file_checks import (
    INPUT_SPECS,
    ProductCheck,
    TensorCheck,
    check_products,
    check_tensor,
    input_type,
    is_matmul_weight,
)
from slmjax.convert.verify.loss_check import LossCheck, check_loss, engine_context, text_windows
from slmjax.convert.verify.tokenizer_check import TokenizerCheck, compare_ids, compare_metadata
from slmjax.data.config import DataConfig
from slmjax.data.provenance import ChangedData
from slmjax.formats.spec import QuantSpec
from slmjax.models.architecture import ModelConfig
from slmjax.models.canonical_form import canonical, differences
from slmjax.models.parameterization import Parameterization

DEFAULT_TOKENS = 512
DEFAULT_WINDOW = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """Result of comparing a file with the model it was exported from."""

    file: str
    run: str
    step: int | None  # of the run
    # rows whose codes differ from those on the devices of the training, and all rows; None if not recorded
    changed_rows: tuple[int, int] | None
    engine: str  # name and version
    settings: tuple[str, ...]  # differences between the settings of file and model
    extra: tuple[str, ...]  # tensors of the file that the model does not have
    tensors: tuple[TensorCheck, ...]
    products: tuple[ProductCheck, ...]
    # None if the file was not run, as it holds another model or another kind of vocabulary
    loss: LossCheck | None
    tokenizer: TokenizerCheck

    @property
    def bytes_hold(self) -> bool:
        """Whether level one holds: equal settings and weights."""
        return not self.settings and not self.extra and all(tensor.holds for tensor in self.tensors)

    @property
    def products_hold(self) -> bool:
        """Whether level two holds: equal matrix products."""
        return all(product.holds for product in self.products)

    @property
    def holds(self) -> bool:
        """Whether all four levels hold."""
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
    """Compare a GGUF file with the model it was exported from, in llama.cpp.

    Args:
      run: the run directory, or the directory of an imported or quantized model.
      file: the exported file.
      data: the text for the losses: its held-out part, or all of it if nothing is held out. None: the
        held-out text of the run.
      max_tokens: number of tokens to score, from the start of the text.
      window: tokens per window; a token sees those before it in its window.
      step: checkpoint of a run; None for the newest.
      changed_data: what to do if the run's text has changed since training.

    Raises:
      ValueError: the model or the file cannot be read, the run's text has changed, or text or engine are
        missing.
    """
    run = Path(run)
    file = Path(file)
    # A missing engine is reported before the model is loaded.
    engine = llama_cpp.import_engine()
    # Two views of the same checkpoint: stored codes for levels one and two, a model to run for level three.
    local_model = open_local_model(run, step=step)
    content = read_gguf(file)
    # The step that was found, since a run in progress may have a newer one by now.
    loaded = loading.load_model(run, step=local_model.step)
    windows = text_windows(loaded, data, max_tokens=max_tokens, length=window, changed_data=changed_data)
    family, file_config = family_and_config(file, content)
    local_model = _as_written(local_model, file_config)
    config = canonical(local_model.config)
    # The file's own architecture decides the names; what they must contain is the trained model's.
    rules = bind(family.tensor_map_for(config), config)
    known = {rule.theirs[0] for rule in rules} | {f"{name}.weight" for name in EXTRA_TENSORS}
    settings = tuple(differences(config, canonical(file_config), tolerance=TOLERANCE))
    extra = tuple(sorted(set(content.tensors) - known))
    tensors = tuple(check_tensor(rule, local_model, content.tensors.get(rule.theirs[0])) for rule in rules)
    # Losses of two different models would only repeat that they differ.
    is_other_model = bool(settings or extra) or any(tensor.is_missing for tensor in tensors)
    tokenizer = compare_metadata(
        content.metadata, local_model.path / "tokenizer", loaded.tokenizer, num_rows=config.known_vocab_size
    )
    loss = None
    # The engine is only given files that it can load as this model.
    if not is_other_model and tokenizer.can_load:
        loss = check_loss(loaded, file, windows, input_specs=_input_specs(rules, content))
        tokenizer = compare_ids(tokenizer, file, loaded.tokenizer, context=engine_context(windows))
    return Verification(
        file=str(file),
        run=str(run),
        step=local_model.step,
        changed_rows=local_model.changed_rows,
        engine=f"llama.cpp in xllamacpp {engine.__version__}",
        settings=settings,
        extra=extra,
        tensors=tensors,
        products=() if is_other_model else tuple(check_products(rules, local_model, content.tensors)),
        loss=loss,
        tokenizer=tokenizer,
    )


def _as_written(local_model: LocalModel, file_config: ModelConfig) -> LocalModel:
    """Return the model with its multipliers in its weights, if the file has it in this form."""
    if local_model.config.parameterization is Parameterization.STANDARD:
        return local_model
    theirs = canonical(file_config)
    if not differences(canonical(local_model.config), theirs, tolerance=TOLERANCE):
        return local_model
    # Codes of a weight that would have to be multiplied are found to differ, by their values.
    plain = folded(local_model, keeps_codes=False)
    return local_model if differences(canonical(plain.config), theirs, tolerance=TOLERANCE) else plain


def _input_specs(rules: list[BoundRule], content: GgufFile) -> dict[str, QuantSpec]:
    """Return the format in which the engine quantizes the input of each weight, by logical path."""
    specs: dict[str, QuantSpec] = {}
    for rule in rules:
        tensor = content.tensors.get(rule.theirs[0])
        # Lookups read single rows, without a product.
        if tensor is None or not is_matmul_weight(tensor, content.tensors):
            continue
        if (spec := INPUT_SPECS.get(input_type(tensor.type))) is not None:
            specs |= dict.fromkeys(rule.ours, spec)
    return specs
