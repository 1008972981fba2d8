"""A language model's requests measured anew, from the rows that `postgrad unlearn` was given."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedTokenizerBase

from postgrad.core.config import DataConfig, ModelConfig, TrainConfig
from postgrad.core.layer_adapters import base_hashes
from postgrad.core.models import choose_layout, within_context
from postgrad.core.runtime import Job
from postgrad.forgetting.entries import ApplyBody, Entry
from postgrad.forgetting.network_service import NetworkService
from postgrad.forgetting.text_batches import Packing
from postgrad.forgetting.text_measures import Known, know
from postgrad.forgetting.text_rows import Sources, Texts, Trees, check_given, read_texts, tokenised
from postgrad.forgetting.text_service import rows_of
from postgrad.forgetting.unlearn_report import measured


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """The rows of a language model's request, as `postgrad unlearn` was given them."""

    forget: str = ""
    """File of rows to forget; "" = a share of data.path. With neither, no figure is measured anew."""
    retain: str = ""
    """File of rows to keep; "" = the rest of data.path."""
    held_out: str = ""
    """File of rows the model never saw."""
    utility: tuple[str, ...] = ()
    """Files of other rows that counted towards model utility."""
    share: float = 0.1
    """How much of data.path was forgotten."""
    learn: bool = False
    """The model learnt its rows in that run, where a part of those to keep was set aside."""
    data: DataConfig = DataConfig()
    """How rows are read."""


def check_rows(config: RowsConfig) -> None:
    """Refuse settings that contradict each other."""
    check_given(config.forget, config.retain, config.data.path, "rows: ")


class TextsAnew:
    """The base of a language model's service, and the rows it is measured on; a `Subject`."""

    def __init__(
        self, service: NetworkService, tokenizer: PreTrainedTokenizerBase, path: str, rows: RowsConfig, job: Job
    ) -> None:
        self._service, self._tokenizer, self._job = service, tokenizer, job
        self._rows = replace(rows, data=within_context(rows.data, self._model))
        layout = choose_layout(ModelConfig(path=path), self._model, job)
        self._packing = Packing(layout, tokenizer.pad_token_id, rows.data.row_length, TrainConfig().micro_tokens)

    @property
    def _model(self) -> nn.Module:
        return self._service.network

    def hashes(self) -> dict[str, str]:
        """Hash each tensor of the base."""
        return base_hashes(self._model)

    def classes(self) -> tuple[str, ...]:
        """Name no classes: there are none."""
        return ()

    def show(self, entry: Entry) -> None:
        """Answer as right after an entry."""
        self._service.show(self._service.in_use_at(entry))

    def figures(self, entry: Entry) -> Mapping[str, float]:
        """Measure a request; nothing if the rows given are not those that it forgot."""
        body = entry.body
        assert isinstance(body, ApplyBody), "only requests that were applied are measured"
        trees = self._trees(body, self._earlier(entry))
        if trees is None:
            return {}
        after = self._know(trees)
        self._service.show(self._earlier(entry))
        return measured(self._know(trees), after, {})

    def _earlier(self, entry: Entry) -> list[str]:
        assert isinstance(entry.body, ApplyBody), "only requests that were applied are measured"
        return [name for name in self._service.in_use_at(entry) if name != entry.body.request]

    def _trees(self, body: ApplyBody, earlier: list[str]) -> Trees | None:
        """Tokenise the rows as they were for a request."""
        asked = set(self._service.request(body.request).samples)
        if not (self._rows.forget or self._rows.data.path):
            return None
        texts = self._read(body.seed, {})
        if texts.named and {each.id for each in texts.rows["forget"]} != asked:
            return None
        texts = self._read(body.seed, rows_of(self._service, earlier))
        trees = tokenised(texts, self._tokenizer, self._rows.data)
        return trees if set(trees.samples) == asked else None

    def _read(self, seed: int, earlier: Mapping[str, str]) -> Texts:
        rows = self._rows
        sources = Sources(rows.forget, rows.retain, rows.held_out, rows.share, rows.learn, rows.utility)
        return read_texts(sources, rows.data, seed, earlier)

    def _know(self, trees: Trees) -> Mapping[str, Known]:
        return know(self._model.eval(), trees, self._tokenizer, self._packing, self._job)
