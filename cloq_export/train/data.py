"""What a training learns from and is evaluated on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from cloq_export.recipe import FineTuneRecipe
from cloq_export.texts.examples import AnyExample, ChatExample, Example, ExampleSet
from cloq_export.texts.named_sets import load_examples
from cloq_export.texts.tokens import TextTokens
from cloq_export.train.sequences import SequenceCounts, Sequences, make_sequences


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where examples are from, and the hash of their content."""

    origin: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A stretch of one plain text that is evaluated on.

    Args:
        sha256: of the text.
        start: its first token, begin tokens not counted.
        end: the token behind its last.
    """

    sha256: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What is learned and what it is evaluated on, as sequences and as their origin.

    Args:
        learned: sequences to learn.
        evaluated: sequences to evaluate on, or None.
        data: where what is learned is from.
        eval_data: where what is evaluated on is from, if it is not held out of the others.
        held_out: which stretch of a text is evaluated on, where it is one.
        repeated: how many of the examples to evaluate on are also learned.
    """

    learned: Sequences
    evaluated: Sequences | None
    data: Origin
    eval_data: Origin | None = None
    held_out: HeldOut | None = None
    repeated: int = 0

    def notes(self, recipe: FineTuneRecipe) -> Iterator[str]:
        """Yield notes on examples that did not fit, for the summary."""
        yield from _count_notes("examples to learn", self.learned.counts, recipe)
        if self.evaluated is not None:
            yield from _count_notes("examples to evaluate on", self.evaluated.counts, recipe)
        elif recipe.eval_samples:
            yield "too few examples to hold any out: nothing was evaluated, and the last adapter is kept"
        if self.repeated:
            yield f"{self.repeated} of the examples to evaluate on are learned too: they stand in the data twice"


def read_training_data(
    recipe: FineTuneRecipe, tokenizer: Any, examples: ExampleSet | None = None, *, bos: str
) -> TrainingData:
    """Read the examples that a recipe names, and hold some of them out where it names none to evaluate on.

    What is held out is a plain text's end, so that nothing learned overlaps it, or examples spread evenly over the
    others: many sets are sorted.

    Args:
        recipe: data, eval_data, eval_samples, seqlen and too_long.
        tokenizer: of the model.
        examples: taken instead of what data names.
        bos: what a sequence of plain text begins with, as in `make_sequences`.

    Raises:
        DataError: the data cannot be read, or no sequence comes of it.
    """
    source = examples or load_examples(recipe.data)
    data = Origin(source.origin, source.sha256)
    learned: tuple[AnyExample, ...] = source.examples

    def sequences(examples: tuple[AnyExample, ...], origin: str) -> Sequences:
        return make_sequences(examples, tokenizer, recipe.seqlen, too_long=recipe.too_long, bos=bos, origin=origin)

    if not recipe.eval_samples:
        return TrainingData(sequences(learned, source.origin), None, data)
    if recipe.eval_data:
        other = load_examples(recipe.eval_data)
        evaluated = sequences(other.examples, other.origin)
        first = dataclasses.replace(evaluated, rows=evaluated.rows[: recipe.eval_samples])
        return TrainingData(
            sequences(learned, source.origin),
            first,
            data,
            Origin(other.origin, other.sha256),
            _stretch(other.examples, tokenizer, recipe, bos, range(len(first.rows))),
            _repeated(learned, other.examples[: recipe.eval_samples]),
        )
    if all(isinstance(example, Example) and example.prompt is None for example in learned):
        whole = sequences(learned, source.origin)
        # At least as much is learned as evaluated.
        held_out = min(recipe.eval_samples, len(whole.rows) // 2)
        if held_out == 0:
            return TrainingData(whole, None, data)
        kept = dataclasses.replace(whole, rows=whole.rows[:-held_out])
        stretch = _stretch(learned, tokenizer, recipe, bos, range(len(kept.rows), len(whole.rows)))
        return TrainingData(kept, dataclasses.replace(whole, rows=whole.rows[-held_out:]), data, held_out=stretch)
    held_out = min(recipe.eval_samples, len(learned) // 2)
    if held_out == 0:
        return TrainingData(sequences(learned, source.origin), None, data)
    places = {number * len(learned) // held_out for number in range(held_out)}
    rest = tuple(example for place, example in enumerate(learned) if place not in places)
    chosen = tuple(learned[place] for place in sorted(places))
    evaluated = sequences(chosen, source.origin)
    return TrainingData(sequences(rest, source.origin), evaluated, data, repeated=_repeated(rest, chosen))


def _repeated(learned: Sequence[AnyExample], evaluated: Sequence[AnyExample]) -> int:
    known = set(learned)
    return sum(example in known for example in evaluated)


def _stretch(
    examples: Sequence[AnyExample], tokenizer: Any, recipe: FineTuneRecipe, bos: str, rows: range
) -> HeldOut | None:
    """Return where some sequences of one plain text lie in it; None if the examples are anything else."""
    if len(examples) != 1 or not isinstance(examples[0], Example) or examples[0].prompt is not None:
        return None
    room = recipe.seqlen - len(TextTokens(tokenizer).window_begin(bos))
    digest = hashlib.sha256(examples[0].completion.encode("utf-8", "surrogatepass")).hexdigest()
    return HeldOut(digest, rows.start * room, rows.stop * room)


def prompts_of(examples: ExampleSet) -> Iterator[str]:
    """Yield what examples ask: prompts, and what users say in chats."""
    for example in examples.examples:
        if isinstance(example, ChatExample):
            yield from (message.content for message in example.messages if message.role == "user")
        elif example.prompt is not None:
            yield example.prompt


def _count_notes(what: str, counts: SequenceCounts, recipe: FineTuneRecipe) -> Iterator[str]:
    if counts.truncated:
        yield f"{counts.truncated} of {counts.examples} {what} were cut to {recipe.seqlen} tokens"
    if counts.dropped:
        yield f"{counts.dropped} of {counts.examples} {what} were left out: too long for {recipe.seqlen} tokens"
    if counts.turns_left_out:
        yield (
            f"{counts.turns_left_out} answers of {what} are not learned: the chat template rewrites earlier turns, or "
            "does not ask for them"
        )
    if counts.straddled:
        yield (
            f"{counts.straddled} of {counts.examples} {what} have a token across the border of what is asked and what "
            "is learned (a blank at the end of the prompt, for example): both were tokenized apart there"
        )
