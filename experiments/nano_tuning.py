"""`nano` without its own held-out text: its settings are chosen on other held-out documents.

slmjax train experiments/nano_tuning.py --optim.muon-lr 0.03
"""

import dataclasses
from collections.abc import Iterator

import slmjax
from slmjax.training import Document, StdlibSource, WeightedSource, is_held_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningText(StdlibSource):
    """The training text of `nano`, without its held-out documents."""

    heldout_fraction: float = 0.03  # the held-out fraction of `nano`

    def documents(self) -> Iterator[Document]:
        return (
            document
            for document in super().documents()
            if not is_held_out(document.id, self.heldout_fraction)
        )

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} without {self.heldout_fraction}"


def experiment() -> slmjax.Experiment:
    """Return nano on the text for tuning."""
    nano = slmjax.load_experiment("nano")
    data = dataclasses.replace(
        nano.data, sources=(WeightedSource(source=TuningText()),), heldout_fraction=0.06
    )
    return dataclasses.replace(nano, data=data, run=dataclasses.replace(nano.run, name="nano-tuning"))
