"""A decoder: embedding, layers after a pattern, final norm, and the language head.

    tokens [s, b] --embedding--> [s/tp, b, h] --layers--> [s/tp, b, h] --norm, output--> logits [s, b, v/tp], or loss

Layers carry their global number in their name (`layers.17.mixer.part.q.weight`), whichever rank holds them. Called with
targets the model returns the loss; without, the logits. It is an ordinary `nn.Module`.

A rank of a pipeline holds the layers of its stages, and the ends that these have; `model/stage.py` runs them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from meshwright.model.block import Layer
from meshwright.model.multi_token import FurtherToken, beside, shifted
from meshwright.model.norms import refuse_conditioned
from meshwright.model.plain_tokens import place_of_plain_tokens
from meshwright.model.positions import LearnedPositions
from meshwright.model.room import refuse_beyond
from meshwright.parallel.dropout import dropout
from meshwright.parallel.fits import check_share, check_sizes
from meshwright.parallel.tally import Tally, attach_loss
from meshwright.parallel.tensor.vocabulary import Embedding, VocabularyRows, next_token_logits, next_token_loss
from meshwright.parallel.where import Where


class Extras(NamedTuple):
    """Modules that not every decoder has."""

    positions: nn.Module | None = None
    """Adds a row for its position to each embedded token."""
    embedding_norm: nn.Module | None = None
    further: Sequence[FurtherToken] = ()
    """What predicts further tokens, in training."""


class Ends(NamedTuple):
    """What is done to the embedded tokens and to the logits."""

    embedding_multiplier: float = 1.0
    embedding_dropout: float = 0.0
    logits_scaling: float = 1.0
    """Divides the logits."""
    further_weight: float = 0.0
    """Weight of the losses of further tokens, together."""


@dataclass
class DecoderState:
    """What generation keeps between steps: each layer's state, in the order in which the layers are used."""

    layers: list[Any]
    batch: int
    """Samples that it is of."""
    length: int = 0
    """Tokens seen so far."""


class LanguageModel(nn.Module):
    """A decoder-only language model."""

    def __init__(
        self,
        layers: dict[int, Layer],
        *,
        embedding: Embedding | None,
        output: VocabularyRows | None,
        final_norm: nn.Module | None = None,
        extras: Extras = Extras(),  # noqa: B008
        ends: Ends = Ends(),  # noqa: B008
        laps: int = 1,
    ) -> None:
        """Compose layers, by their global number, with the two ends; without `output` the embedding is that too (tied).

        The layers are gone through `laps` times, with the same weights. Of a pipeline's ranks, those without the first
        stage have no embedding (but for the copy of a tied one), those without the last no final norm and no output.

        Raises:
            ValueError: naming each part that sees later tokens (the loss would be of tokens that the model was shown),
                or each norm that asks for a condition.
        """
        super().__init__()
        further = {f"multi_token.{depth}": each for depth, each in enumerate(extras.further)}
        stack: dict[str, nn.Module] = {f"layers.{number}": layer for number, layer in layers.items()}
        if problems := [line for name, layer in (stack | further).items() for line in _not_causal(name, layer)]:
            raise ValueError("\n".join(problems))
        refuse_conditioned({"embedding_norm": extras.embedding_norm, "final_norm": final_norm}, "a LanguageModel")
        check_share("embedding_dropout", ends.embedding_dropout)
        self.embedding, self.positions, self.embedding_norm = embedding, extras.positions, extras.embedding_norm
        self.layers = nn.ModuleDict({str(number): layer for number, layer in layers.items()})
        self.final_norm = final_norm
        self.output = output
        self.multi_token = nn.ModuleList(extras.further)
        self.ends, self.laps = ends, laps

    @property
    def held_layers(self) -> list[nn.Module]:
        """Return all layers that are here, those that predict further tokens behind the stack's."""
        return [*self.layers.values(), *(each.layer for each in self.multi_token if isinstance(each, FurtherToken))]

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

        `tally` (`tally_of(model)`) collects and attaches what training needs besides: the losses of routers, of
        Mixture-of-Depths' predictors and of further tokens, and the loads that routers move by (`finish_step`). None
        leaves all of these out, silently: the gradient is then that of the returned loss alone, for comparisons.

        Without `where` the tokens are whole samples of no run, and the loss is the mean over the targets that are not
        -100; those tokens alone count for routers too. What dropout and noise draw goes by `torch.manual_seed` then.

        Raises:
            ValueError: without `where`: if there are no tokens, or they, or the targets, are of another shape or type,
                of no word, or more than there are learned positions.
        """
        if where is None:
            most = len(self.positions.weight) if isinstance(self.positions, LearnedPositions) else None
            where = place_of_plain_tokens(tokens, targets, self.output_rows.vocab_size, most, is_training=self.training)
        x = self.begin(tokens, where)
        for lap in range(self.laps):
            of_lap = where.of_lap(lap)
            for layer in self.layers.values():
                x = layer(x, of_lap, tally)
        if targets is None:
            return self.logits(x)
        return self.loss(x, tokens, targets, where, tally)

    def begin(self, tokens: Int64[Tensor, "s b"], where: Where) -> Float[Tensor, "s_local b h"]:
        """Return what the first layer takes."""
        x = self._placed(self._embedded(tokens), where.position)
        if self.training and self.ends.embedding_dropout:
            x = dropout(x, self.ends.embedding_dropout, where=where, name="embedding/dropout")
        return x

    def logits(self, x: Float[Tensor, "s_local b h"]) -> Float[Tensor, "s b v"]:
        """Return the logits of what the last layer gives."""
        return next_token_logits(self._scaled(x, self.final_norm), self.output_rows)

    def loss(
        self,
        x: Float[Tensor, "s_local b h"],
        tokens: Int64[Tensor, "s b"],
        targets: Int64[Tensor, "s b"],
        where: Where,
        tally: Tally | None,
    ) -> Float[Tensor, ""]:
        """Return the loss of what the last layer gives; in training the losses of further tokens are attached to it."""
        last = self._scaled(x, self.final_norm)
        loss = next_token_loss(last, self.output_rows, targets, where.step_tokens, where.limits)
        if self.training and tally is not None and self.multi_token:
            # To the loss, not to x: a split backward takes the ways to the output matrix one by one, and none of them
            # may lead through another (torch frees what it has gone through).
            loss = attach_loss(loss, self._further_loss(x, tokens, targets, where, tally))
        return loss

    def _further_loss(self, x: Tensor, tokens: Tensor, targets: Tensor, where: Where, tally: Tally) -> Tensor:
        stream, total = x, x.new_zeros(())
        for by, further in enumerate(self.multi_token, start=1):
            assert isinstance(further, FurtherToken), "the list holds nothing else"
            ahead = shifted(where, tokens, targets, by)
            stream = further(stream, beside(self._embedded(ahead.tokens), x), ahead.where, tally)
            normed = self._scaled(stream, further.final_norm)
            loss = next_token_loss(normed, self.output_rows, ahead.targets, where.step_tokens, where.limits)
            tally.add(f"{further.name}.loss", loss)
            total = total + loss
        return total * (self.ends.further_weight / len(self.multi_token))

    def _scaled(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        x = x if norm is None else norm(x)
        return x if self.ends.logits_scaling == 1.0 else x / self.ends.logits_scaling

    def initial_state(self, batch: int, max_len: int | None = None) -> DecoderState:
        """Return every layer's state before the first token; with `max_len` room for that many tokens is made at once.

        Without it what grows with the tokens is doubled whenever it is full.

        Raises:
            ValueError: if either is below 0.
        """
        sizes = {"batch": batch} | ({} if max_len is None else {"max_len": max_len})
        check_sizes(sizes, may_be_none=sizes)
        return DecoderState([layer.initial_state(batch, max_len) for layer in self._in_order()], batch)

    def step(
        self, tokens: Int64[Tensor, "s b"], state: DecoderState, *, only_last: bool = False
    ) -> Float[Tensor, "s_given b v"]:
        """Return the logits of the next tokens, and bring the state forward; where there are none it stays as it is.

        `only_last`: of the last of them alone ([1, b, v]), as generation goes on behind a prompt from that one. The
        logits of a prompt of 32K tokens over 128K words are 17 GB.

        Raises:
            ValueError: if there is no room for them, or no learned position, or the state is of other samples.
        """
        if tokens.shape[1] != state.batch:
            raise ValueError(f"batch = {tokens.shape[1]} of the tokens: must be that of the state, {state.batch}")
        end = state.length + len(tokens)
        if isinstance(self.positions, LearnedPositions):
            refuse_beyond(len(self.positions.weight), end, "the table of learned positions")
        position = torch.arange(state.length, end, device=tokens.device)
        x = self._placed(self._embedded(tokens), position)
        if tokens.numel():  # no part needs to know how to compute nothing
            for layer, of_layer in zip(self._in_order(), state.layers, strict=True):
                x = layer.step(x, of_layer)
            state.length = end
        return self.logits(x[-1:] if only_last else x)

    def _embedded(self, tokens: Tensor) -> Tensor:
        assert self.embedding is not None, "the first stage has an embedding"
        x: Tensor = self.embedding(tokens)
        return x if self.ends.embedding_multiplier == 1.0 else x * self.ends.embedding_multiplier

    def _placed(self, x: Tensor, position: Tensor) -> Tensor:
        x = x if self.positions is None else self.positions(x, position)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _in_order(self) -> list[Layer]:
        return [layer for layer in self.layers.values() if isinstance(layer, Layer)] * self.laps


def _not_causal(name: str, layer: nn.Module) -> Iterator[str]:
    """Yield a line for each module of a layer that says of itself that it sees later tokens."""
    for within, module in layer.named_modules(prefix=name):
        if getattr(module, "sees_later_tokens", False):
            yield (
                f"{within} sees later tokens, and a LanguageModel predicts each token from those before it alone;"
                " a part that sees none, such as attention with is_causal = True, would fit"
            )
