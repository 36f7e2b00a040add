"""A decoder: embedding, layers after a pattern, final norm, and the language head.

    tokens [s, b] --embedding--> [s/tp, b, h] --layers--> [s/tp, b, h] --norm, output--> logits [s, b, v/tp], or loss

Layers carry their global number in their name (`layers.17.mixer.part.q.weight`), whichever rank holds them. Called with
targets the model returns the loss; without, the logits. It is an ordinary `nn.Module`.

A rank of a pipeline holds the layers of its stages, and the ends that these have; `model/stage.py` runs them.
"""

from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from meshwright.kernels.limits import USUAL, Limits
from meshwright.model.block import Layer
from meshwright.parallel.tally import Tally
from meshwright.parallel.tensor.vocabulary import Embedding, VocabularyRows, next_token_logits, next_token_loss
from meshwright.parallel.where import Where, where_of_plain_tokens


class LanguageModel(nn.Module):
    """A decoder-only language model."""

    def __init__(
        self,
        layers: dict[int, Layer],
        *,
        embedding: Embedding | None,
        final_norm: nn.Module | None,
        output: VocabularyRows | None,
    ) -> None:
        """Compose layers, by their global number, with the two ends; without `output` the embedding is that too (tied).

        Of a pipeline's ranks, those without the first stage have no embedding (but for the copy of a tied one), those
        without the last no norm and no output.
        """
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleDict({str(number): layer for number, layer in layers.items()})
        self.final_norm = final_norm
        self.output = output

    @property
    def output_rows(self) -> VocabularyRows:
        """Return the matrix that turns vectors into logits."""
        rows = self.embedding if self.output is None else self.output
        assert rows is not None, "the last stage has an output"
        return rows

    def forward(
        self,
        tokens: Int64[Tensor, "s b"],
        targets: Int64[Tensor, "s b"] | None = None,
        where: Where | None = None,
        tally: Tally | None = None,
    ) -> Float[Tensor, ""] | Float[Tensor, "s b v"]:
        """Return the loss of the targets (their sum divided by `where.step_tokens`), or the logits without targets.

        Where a sample lies on several ranks, `tokens` and `targets` are those that a mixer sees ([s/cp, b]), and the
        loss is this rank's share: the shares of all ranks add up to it. Logits are of its part of the vocabulary.
        """
        where = where or where_of_plain_tokens(tokens)
        x = self.begin(tokens)
        for layer in self.layers.values():
            x = layer(x, where, tally)
        return self.end(x, targets, where.step_tokens, where.limits)

    def begin(self, tokens: Int64[Tensor, "s b"]) -> Float[Tensor, "s_local b h"]:
        """Return what the first layer takes."""
        assert self.embedding is not None, "the first stage has an embedding"
        x: Tensor = self.embedding(tokens)
        return x

    def end(
        self,
        x: Float[Tensor, "s_local b h"],
        targets: Int64[Tensor, "s b"] | None = None,
        step_tokens: float = 1.0,
        limits: Limits = USUAL,
    ) -> Float[Tensor, ""] | Float[Tensor, "s b v"]:
        """Return the loss of what the last layer gives, or the logits without targets."""
        assert self.final_norm is not None, "the last stage has a norm"
        x = self.final_norm(x)
        if targets is None:
            return next_token_logits(x, self.output_rows)
        return next_token_loss(x, self.output_rows, targets, step_tokens, limits)

    def initial_state(self, batch: int, max_len: int) -> list[Any]:
        """Return every layer's state before the first token, with room for `max_len` tokens."""
        return [layer.initial_state(batch, max_len) for layer in self._layers()]

    def step(self, tokens: Int64[Tensor, "s b"], state: list[Any]) -> Float[Tensor, "s b v"]:
        """Return the logits of the next tokens, and bring the state forward."""
        x = self.begin(tokens)
        for layer, layer_state in zip(self._layers(), state, strict=True):
            x = layer.step(x, layer_state)
        return self.end(x)

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers.values() if isinstance(layer, Layer)]
