"""Requests that join and leave a decoding equal their solo runs, token by token and in their logits."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import lorafleet.generation.decoder as module
from benchmarks.mixing import answer
from lorafleet.config import GenerationConfig
from lorafleet.errors import ModelError
from lorafleet.generation.decode import generate_ids
from lorafleet.generation.decoder import Decoder
from lorafleet.generation.request import Request
from lorafleet.lora import LoraBank, Routing
from lorafleet.models.cached_attention import KeyValueCache
from lorafleet.models.load import Base
from tests.generation.tiny_bank import tiny_base, trained_bank
from tests.tiny import ARCHITECTURES

PROMPTS = [[5, 9, 7], [40, 41, 42, 43, 44, 45, 46, 47], [300], [12, 13, 14, 15, 16], [5, 9, 7, 11, 200, 100]]
SLOTS = [0, -1, 1, 2, 1]


class Recorded(Request):
    """Forces an answer, and keeps the logits that led to each token of it."""

    def __init__(self, prompt: Sequence[int], slot: int, forced: Sequence[int], **rest: object) -> None:
        super().__init__(prompt, slot, GenerationConfig(max_new_tokens=len(forced)), 0, frozenset(), **rest)  # type: ignore[arg-type]
        self.forced, self.logits, self.greedy = list(forced), list[Tensor](), False

    def choose(self, scores: Tensor) -> int:
        self.logits.append(scores.clone())
        return self.forced[len(self.answer)]


def solo(base: Base, bank: LoraBank, request: Recorded) -> Tensor:
    """The logits of the whole sequence at once."""
    ids = torch.tensor([request.prompt + request.forced[:-1]])
    with torch.no_grad(), bank.route(Routing((request.slot,), (ids.shape[1],))):
        logits: Tensor = base.model(input_ids=ids, use_cache=False).logits[0, len(request.prompt) - 1 :]
    return logits


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("step_tokens", "piece_tokens"), [(1024, 64), (3, 2)])
def test_teacher_forced_logits_equal_the_whole_sequence(
    arch: str, step_tokens: int, piece_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEP_TOKENS", step_tokens)
    monkeypatch.setattr(module, "PIECE_TOKENS", piece_tokens)
    monkeypatch.setattr(module, "_FIRST_CAPACITY", 4)
    base = tiny_base(arch)
    bank = trained_bank(base)
    assert Decoder.fits(base, bank)
    decoder = Decoder(base, bank, 3)
    random = torch.Generator().manual_seed(0)
    answers = torch.randint(3, 300, (5, 7), generator=random).tolist()
    requests = [Recorded(*one) for one in zip(PROMPTS, SLOTS, answers, strict=True)]
    for request in requests[:2]:
        decoder.submit(request)
    decoder.step()
    for request in requests[2:]:
        decoder.submit(request)
    while decoder.busy:
        decoder.step()
    for request in requests:
        wanted = solo(base, bank, request)
        assert (torch.stack(request.logits) - wanted).abs().max() < 1e-9 * wanted.abs().max()


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize(
    ("arch", "heads"), [("llama", (6, 2)), ("qwen2", (8, 2)), ("gemma", (4, 1)), ("gpt_neox", (6, 6))]
)
@pytest.mark.parametrize("width", [16, None])
def test_logits_are_the_same_to_the_bit_alone_and_among_others(
    arch: str, heads: tuple[int, int], width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if arch == "gemma" and torch.backends.cpu.get_cpu_capability() != "AVX2":
        pytest.skip("gemma is not the same to the bit on AVX-512 cores")
    monkeypatch.setattr("lorafleet.lora.packed._fastest_width", lambda: width)
    # PyTorch multiplies matrices of fewer than 400 products by another kernel: heads of 32 have more.
    shape = {"hidden_size": 32 * heads[0], "intermediate_size": 160, "num_attention_heads": heads[0]}
    own = {} if arch == "gpt_neox" else {"num_key_value_heads": heads[1], "head_dim": 32}
    base = tiny_base(arch, torch.float32, **shape, **own)
    bank = trained_bank(base, (8, 5, 16))
    random = torch.Generator().manual_seed(4)
    lengths = (1, 2, 5, 17, 64, 65, 130, 240, 20, 20)
    prompts = [torch.randint(3, 300, (length,), generator=random).tolist() for length in lengths]
    prompts.append([*prompts[7][:150], 9])  # goes on from what another has read
    answers = torch.randint(3, 300, (len(prompts), 18), generator=random).tolist()
    slots = [0, 0, -1, 1, 2, 0, 1, 0, -1, 2, 0]

    def run(rows: int, gap: int, order: Sequence[int]) -> list[Tensor]:
        requests = [Recorded(prompts[i], slots[i], answers[i]) for i in order]
        answer(Decoder(base, bank, rows), requests, gap)
        return [torch.stack(request.logits) for request in requests]

    alone = [run(1, 0, [i])[0] for i in range(len(prompts))]
    shuffled = [torch.randperm(len(prompts), generator=random).tolist() for _ in range(3)]
    ways = [(1, 0, [7, 10]), *zip((4, 4, 11), (0, 3, 1), shuffled, strict=True)]
    for rows, gap, order in ways:
        for i, logits in zip(order, run(rows, gap, order), strict=True):
            assert torch.equal(logits, alone[i]), (rows, gap, i)


@pytest.mark.parametrize(("arch", "bias"), [("llama", "none"), ("phi", "all")])  # a trained bias at phi's output head
def test_prepared_weights_change_rounding_only(arch: str, bias: str) -> None:
    base = tiny_base(arch, torch.float32)
    bank = trained_bank(base, bias=bias)
    requests = [Recorded(p, s, [7, 8, 9, 10]) for p, s in zip(PROMPTS, SLOTS, strict=True)]
    wanted = [solo(base, bank, request) for request in requests]
    decoder = Decoder(base, bank, 5)
    decoder.speed_up()
    for request in requests:
        decoder.submit(request)
    while decoder.busy:
        decoder.step()
    for request, one in zip(requests, wanted, strict=True):
        assert (torch.stack(request.logits) - one).abs().max() < 1e-5 * one.abs().max()


def test_weights_may_be_prepared_while_requests_run() -> None:
    base = tiny_base(dtype=torch.float32)
    bank = trained_bank(base, target_modules=["q_proj", "k_proj", "v_proj"])
    requests = [Recorded(p, s, [7, 8, 9, 10]) for p, s in zip(PROMPTS, SLOTS, strict=True)]
    wanted = [solo(base, bank, request) for request in requests]
    bank.speed_up(lambda: base.model(input_ids=torch.tensor([[1, 2]]), use_cache=False), training=True)
    decoder = Decoder(base, bank, 5)
    for request in requests:
        decoder.submit(request)
    for _ in range(2):
        decoder.step()
    decoder.speed_up()
    while decoder.busy:
        decoder.step()
    for request, logits in zip(requests, wanted, strict=True):
        assert torch.allclose(torch.stack(request.logits), logits, rtol=1e-4, atol=1e-4)


def test_a_row_goes_on_from_what_it_has_read_for_the_same_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_TOKENS", 4)
    base = tiny_base()
    bank = trained_bank(base)
    decoder = Decoder(base, bank, 2)

    def answer(request: Recorded) -> Recorded:
        decoder.submit(request)
        while decoder.busy:
            decoder.step()
        return request

    first = answer(Recorded(PROMPTS[1], 0, [7, 8, 9]))
    longer = Recorded([*first.prompt, 7, 8, 20, 21], 0, [5, 6])
    assert decoder.rows[0].common(longer) == len(first.prompt) == 8  # an answer is not read in pieces
    again = Recorded(PROMPTS[1], 0, [7, 8, 9])
    assert decoder.rows[0].common(again) == 4  # its last piece is read again, for its logits
    other = Recorded([*first.prompt, 7, 8, 20, 21], 1, [5, 6])
    assert decoder.rows[0].common(other) == 0
    for request in (longer, again, other):
        wanted = solo(base, bank, answer(request))
        assert torch.allclose(torch.stack(request.logits), wanted, rtol=1e-9)
    decoder.forget(0)
    assert all(row.common(Recorded(PROMPTS[1], 0, [7])) == 0 for row in decoder.rows)


def test_a_long_prompt_does_not_keep_others_from_their_next_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEP_TOKENS", 4)
    monkeypatch.setattr(module, "PIECE_TOKENS", 4)
    base = tiny_base()
    decoder = Decoder(base, None, 3)
    long, short, next_long = (
        Recorded(range(3, 23), -1, [7]),
        Recorded([5], -1, range(7, 17)),
        Recorded(range(8), -1, [7]),
    )
    for request in (long, short, next_long):
        decoder.submit(request)
    for step in range(1, 8):
        decoder.step()
        assert len(short.answer) == step
        assert (long.done, next_long.done) == (step >= 5, step >= 7)


class Calling(Recorded):
    """Calls back after each token."""

    def __init__(self, prompt: Sequence[int], slot: int, forced: Sequence[int], back: Callable[[], object]) -> None:
        super().__init__(prompt, slot, forced)
        self.back = back

    def take(self, token: int) -> None:
        super().take(token)
        self.back()


def test_after_an_interrupt_all_go_on() -> None:
    base = tiny_base()
    bank = trained_bank(base)
    interrupts = [KeyboardInterrupt, KeyboardInterrupt]

    def interrupted() -> None:
        if interrupts:
            raise interrupts.pop()

    first, second, third = (Recorded(PROMPTS[i], -1, [7] * (1 + 3 * i)) for i in range(3))
    loud = Calling(PROMPTS[3], -1, [7, 8, 9], back=interrupted)
    decoder = Decoder(base, bank, 4)
    for request in (first, loud, second, third):
        decoder.submit(request)
    finished: list[Request] = []
    while decoder.busy:
        try:
            finished += decoder.step()
        except KeyboardInterrupt:
            assert first.done and first not in finished
    assert {id(request) for request in finished} == {id(request) for request in (first, second, third, loud)}
    for request in (first, second, third, loud):
        assert torch.allclose(torch.stack(request.logits), solo(base, bank, request), rtol=1e-9)


def test_who_comes_into_a_row_in_a_callback_takes_none_of_its_tokens() -> None:
    base = tiny_base()
    bank = trained_bank(base)
    decoder = Decoder(base, bank, 2)

    def back() -> None:
        if given_up in [row.request for row in decoder.rows]:
            decoder.cancel(given_up)
            decoder.submit(new)
            decoder.step()

    caller = Calling(PROMPTS[0], 0, [7, 8, 9, 10], back=back)
    given_up, new = Recorded(PROMPTS[1], 1, [7, 8]), Recorded(PROMPTS[4], 1, [7, 8, 9])
    decoder.submit(caller)
    decoder.submit(given_up)
    while decoder.busy:
        decoder.step()
    for request in (caller, new):
        assert torch.allclose(torch.stack(request.logits), solo(base, bank, request), rtol=1e-9)
    assert not given_up.answer


def test_one_adapter_whose_logits_are_no_numbers_fails_alone() -> None:
    base = tiny_base()
    bank = trained_bank(base)
    healthy = [Recorded(PROMPTS[0], 1, [7, 8, 9]), Recorded(PROMPTS[1], -1, [7, 8, 9])]
    wanted = [solo(base, bank, request) for request in healthy]
    next(iter(bank.slot_parameters(0).values())).value.fill_(torch.nan)
    decoder = Decoder(base, bank, 3)
    sick = Request(PROMPTS[3], 0, GenerationConfig(max_new_tokens=3), 0, frozenset())
    for request in (sick, *healthy):
        decoder.submit(request)
    while decoder.busy:
        decoder.step()
    assert isinstance(sick.error, ModelError) and not sick.answer
    later = Recorded(PROMPTS[1], -1, [7, 8, 9])  # takes the row that held them
    decoder.submit(later)
    while decoder.busy:
        decoder.step()
    for request, one in zip([*healthy, later], [*wanted, wanted[1]], strict=True):
        assert torch.allclose(torch.stack(request.logits), one, rtol=1e-9)


def test_what_a_request_given_up_has_read_reaches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEP_TOKENS", 3)
    monkeypatch.setattr(module, "PIECE_TOKENS", 3)
    base = tiny_base()
    bank = trained_bank(base)
    long, later = Recorded(PROMPTS[1], -1, range(7, 17)), Recorded(PROMPTS[2], -1, [7, 8])
    wanted = [solo(base, bank, request) for request in (long, later)]
    next(iter(bank.slot_parameters(0).values())).value.fill_(torch.nan)
    decoder = Decoder(base, bank, 2)
    decoder.submit(long)
    while not long.answer:
        decoder.step()
    sick = Recorded(PROMPTS[1], 0, [7])
    decoder.submit(sick)
    decoder.step()  # reads the beginning of its prompt, which is not judged yet
    decoder.cancel(sick)
    decoder.submit(later)  # takes its row, and stands beside a longer one
    while decoder.busy:
        decoder.step()
    for request, one in zip((long, later), wanted, strict=True):
        assert torch.allclose(torch.stack(request.logits), one, rtol=1e-9)


def test_a_merged_adapter_answers_as_before() -> None:
    base = tiny_base()
    bank = trained_bank(base)
    config = GenerationConfig(max_new_tokens=6)
    wanted = generate_ids(base, bank, PROMPTS, [1] * 5, config)
    twin = tiny_base()
    merged = trained_bank(twin)
    merged.merge(1)
    assert generate_ids(twin, merged, PROMPTS, [1] * 5, config) == wanted


def test_models_outside_the_attention_interface_are_told_apart() -> None:
    base = tiny_base()
    base.model.config.is_decoder = True
    layer = base.model.model.layers[0].self_attn
    layer.is_causal = False
    assert not Decoder.fits(base, None)
    with pytest.raises(ModelError, match="cannot be decoded in flat batches"):
        Decoder(base, None, 2)


def test_an_answer_for_which_memory_ends_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_CAPACITY", 12)
    base = tiny_base("llama")
    bank = trained_bank(base)
    decoder = Decoder(base, bank, 3)
    long, before, behind = (Recorded([5, 9, 7], 0, [11] * count) for count in (40, 8, 12))
    decoder.submit(before)
    decoder.step()
    longer, left = KeyValueCache._longer, [1, 1, 1]

    def scarce(tensor: Tensor, capacity: int) -> Tensor:
        if not left:
            raise MemoryError("no memory for keys and values")
        left.pop()
        return longer(tensor, capacity)

    with monkeypatch.context() as patch:
        patch.setattr(KeyValueCache, "_longer", staticmethod(scarce))
        decoder.submit(long)
        assert decoder.step() == [long]
    assert isinstance(long.error, MemoryError)
    decoder.submit(behind)  # whose keys and values need less than the layers that had grown already
    while decoder.busy:
        decoder.step()
    for request in (before, behind):
        torch.testing.assert_close(torch.stack(request.logits), solo(base, bank, request), atol=1e-4, rtol=1e-4)
