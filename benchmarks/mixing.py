"""Whether requests that are answered together get the answers that each gets alone, on a real model and its adapters.

Each request is answered alone first, greedily. Then all are answered together in several orders, batches and times of
admission, led along the same tokens, and their logits compared. Where the likeliest token is another one, greedy
decoding would have gone another way.
"""

import random
from collections.abc import Sequence
from itertools import cycle, islice

import click
import torch
from torch import Tensor

from benchmarks.rows import tokenized_rows
from lorafleet.config import GenerationConfig
from lorafleet.config.model import ModelConfig
from lorafleet.config.registry import RegistryConfig
from lorafleet.errors import LorafleetError
from lorafleet.generation.decoder import Decoder
from lorafleet.generation.request import Request
from lorafleet.models.load import load_base
from lorafleet.serving.residents import Residents
from lorafleet.serving.source import AdapterSource

NEAR = 2e-4
"""Between the two likeliest tokens: rounding may turn them round."""

WAYS = ((32, 0), (32, 1), (8, 2), (5, 1))
"""Rows at a time, and steps between one request's admission and the next."""


class Led(Request):
    """Takes the tokens it is given, or its likeliest ones where it is given none, and keeps the logits."""

    def __init__(self, prompt: Sequence[int], slot: int, length: int, tokens: Sequence[int] | None = None) -> None:
        super().__init__(prompt, slot, GenerationConfig(max_new_tokens=length), 0, frozenset())
        self.tokens, self.logits, self.greedy = tokens, list[Tensor](), False

    def choose(self, scores: Tensor) -> int:
        """The next token."""
        self.logits.append(scores.clone())
        return int(scores.argmax()) if self.tokens is None else self.tokens[len(self.answer)]


def answer(decoder: Decoder, requests: Sequence[Request], gap: int) -> None:
    """Answer requests with prepared weights, each ``gap`` steps after the one before has come in."""
    decoder.speed_up()
    for request in requests:
        while not decoder.free:
            decoder.step()
        decoder.submit(request)
        for _ in range(gap):
            decoder.step()
    while decoder.busy:
        decoder.step()


@click.command()
@click.argument("adapters", nargs=-1, required=True)
@click.option("--model", default="smollm2-135m", show_default=True, help="The base.")
@click.option(
    "--data", default="sample:movie_polarity", show_default=True, help="Rows whose beginnings are the prompts."
)
@click.option(
    "--requests",
    "count",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="They go to the base and the adapters in turn.",
)
@click.option("--new-tokens", type=click.IntRange(1), default=24, show_default=True, help="Of each answer.")
def main(adapters: Sequence[str], model: str, data: str, count: int, new_tokens: int) -> None:
    """Answer requests to ADAPTERS (folders) and their base alone and together, and compare."""
    try:
        compare(adapters, model, data, count, new_tokens)
    except LorafleetError as error:
        raise click.ClickException(str(error)) from error


def compare(adapters: Sequence[str], model: str, data: str, count: int, new_tokens: int) -> None:
    """Print how far logits are apart, and how many answers would differ.

    Raises:
        LorafleetError: The model, an adapter or the rows cannot be used.
    """
    base = load_base(ModelConfig(model_name_or_path=model, device="cpu", dtype="float32"))
    residents, source = Residents(base, len(adapters), check_base=True), AdapterSource(base, RegistryConfig())
    taken = [-1]
    for name in adapters:
        resident = residents.bring_in(source.find(name))
        assert resident is not None, "there is a slot for each"
        taken.append(resident.slot)
    slots, rows_of_data = list(islice(cycle(taken), count)), cycle(tokenized_rows(data, base.tokenizer))
    prompts = [row["input_ids"][: 8 + 3 * (i % 12)] for i, row in enumerate(islice(rows_of_data, count))]

    def run(rows: int, gap: int, requests: Sequence[Led]) -> list[Tensor]:
        answer(Decoder(base, residents.bank, rows), requests, gap)
        return [torch.stack(request.logits) for request in requests]

    alone = [Led(prompt, slot, new_tokens) for prompt, slot in zip(prompts, slots, strict=True)]
    wanted = run(1, 0, alone)
    largest = max(float(one.abs().max()) for one in wanted)
    click.echo(f"{count} requests to {len(adapters)} adapters and the base, {new_tokens} tokens each")
    click.echo(f"largest logit {largest:.1f}")
    for number, (rows, gap) in enumerate(WAYS):
        order = random.Random(number).sample(range(count), count)
        led = [Led(prompts[i], slots[i], new_tokens, alone[i].answer) for i in order]
        logits = run(rows, gap, led)
        apart = sorted(float((one - wanted[i]).abs().max()) for i, one in zip(order, logits, strict=True))
        others = [
            float(one[k].topk(2).values.diff().abs())
            for i, one in zip(order, logits, strict=True)
            for k in (one.argmax(1) != torch.tensor(alone[i].answer)).nonzero().flatten().tolist()
        ]
        click.echo(
            f"{rows} rows, {gap} steps between: logits at most {apart[-1]:.1e} apart, median {apart[count // 2]:.1e}, "
            f"{sum(one > 1e-4 for one in apart)} above 1e-4, {apart.count(0)} of {count} requests the same to the bit; "
            f"{len(others)} tokens of {count * new_tokens} are others, "
            f"{sum(one < NEAR for one in others)} of them nearer than {NEAR}"
        )


if __name__ == "__main__":
    main()
