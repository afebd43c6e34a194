"""Every row of a mixed batch answers as it would alone."""

import pytest
import torch

from lorafleet.config import GenerationConfig
from lorafleet.errors import ConfigError, ModelError, RoutingError
from lorafleet.generation import answer_text, generate_ids, stop_ids
from lorafleet.generation.padded import pad_left
from lorafleet.generation.stops import template_stops
from tests.generation.tiny_bank import tiny_base, trained_bank
from tests.tiny import ARCHITECTURES, tiny_tokenizer

PROMPTS = [[5, 9, 7], [40, 41, 42, 43, 44, 45, 46, 47], [300], [12, 13, 14, 15, 16], [5, 9, 7, 11, 200, 100]]
SLOTS = [0, -1, 1, 2, 1]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_mixed_rows_equal_solo_rows(arch: str) -> None:
    base = tiny_base(arch)
    bank = trained_bank(base)
    config = GenerationConfig(max_new_tokens=12)
    together = generate_ids(base, bank, PROMPTS, SLOTS, config)
    alone = [generate_ids(base, bank, [p], [s], config)[0] for p, s in zip(PROMPTS, SLOTS, strict=True)]
    assert together == alone
    assert generate_ids(base, bank, PROMPTS, SLOTS, config, batch_size=2) == alone
    assert len({tuple(generate_ids(base, bank, [PROMPTS[1]], [s], config)[0]) for s in (-1, 0, 1, 2)}) == 4


def test_greedy_equals_plain_recomputation() -> None:
    base = tiny_base()
    answer = generate_ids(base, None, [PROMPTS[1]], [-1], GenerationConfig(max_new_tokens=10))[0]
    ids = list(PROMPTS[1])
    for _ in range(10):
        token = int(base.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stop_ids(base):
            break
        ids.append(token)
    assert answer == ids[len(PROMPTS[1]) :]


def test_base_rows_equal_a_model_without_bank() -> None:
    config = GenerationConfig(max_new_tokens=8)
    plain = generate_ids(tiny_base(), None, PROMPTS, [-1] * 5, config)
    base = tiny_base()
    assert generate_ids(base, trained_bank(base), PROMPTS, [-1] * 5, config) == plain


def test_sampling_is_seeded_per_prompt_and_leaves_the_global_state() -> None:
    base = tiny_base()
    bank = trained_bank(base)
    config = GenerationConfig(max_new_tokens=10, temperature=1.5, top_k=50, top_p=0.95, repetition_penalty=1.2)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    together = generate_ids(base, bank, PROMPTS, SLOTS, config)
    assert torch.equal(torch.get_rng_state(), before)
    assert together == [generate_ids(base, bank, [p], [s], config)[0] for p, s in zip(PROMPTS, SLOTS, strict=True)]
    other = generate_ids(base, bank, PROMPTS, SLOTS, config.model_copy(update={"seed": 43}))
    assert other != together
    copies = generate_ids(base, bank, [PROMPTS[0]] * 3, [0] * 3, config)
    assert copies[0] == together[0]
    assert len({tuple(c) for c in copies}) > 1


def test_sampling_follows_the_softmax() -> None:
    base = tiny_base()
    config = GenerationConfig(max_new_tokens=1, temperature=0.7)
    count = 4000
    answers = generate_ids(base, None, [PROMPTS[0]] * count, [-1] * count, config, batch_size=1000)
    wanted = (base.model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7).softmax(-1)
    drawn = torch.zeros_like(wanted)
    for answer in answers:
        drawn[answer[0] if answer else 2] += 1 / count
    stopped = [i for i in stop_ids(base) if i != 2]
    wanted[2] += wanted[stopped].sum()
    wanted[stopped] = 0
    assert 0.5 * (drawn - wanted).abs().sum() < 0.2
    top = wanted.argmax()
    assert abs(drawn[top] - wanted[top]) < 4 * (wanted[top] / count) ** 0.5


def test_model_defaults_do_not_leak_in() -> None:
    base = tiny_base()
    config = GenerationConfig(max_new_tokens=10)
    plain = generate_ids(base, None, PROMPTS, [-1] * 5, config)
    settings = base.model.generation_config
    settings.update(repetition_penalty=5.0, do_sample=True, temperature=3.0, min_new_tokens=9)
    assert generate_ids(base, None, PROMPTS, [-1] * 5, config) == plain
    assert base.model.generation_config is settings


def test_stops_at_every_end_token() -> None:
    base = tiny_base()
    config = GenerationConfig(max_new_tokens=10)
    answer = generate_ids(base, None, [PROMPTS[1]], [-1], config)[0]
    assert len(answer) == 10
    base.model.generation_config.eos_token_id = [2, answer[4]]
    cut = generate_ids(base, None, [PROMPTS[1]], [-1], config)[0]
    assert cut == answer[: answer.index(answer[4])]


def test_end_of_turn_comes_from_the_template() -> None:
    tokenizer = tiny_tokenizer()
    assert template_stops(tokenizer) == (2,)
    assert template_stops(tiny_tokenizer(chat_template=False)) == (2,)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    assert template_stops(tokenizer) == (0, 2)
    tokenizer.chat_template = "{{ raise_exception('no such roles') }}"
    assert template_stops(tokenizer) == ()


def test_streamed_pieces_make_the_answer() -> None:
    base = tiny_base()
    pieces: list[str] = []
    for prompt in PROMPTS:
        pieces.clear()
        ids = generate_ids(base, None, [prompt], [-1], GenerationConfig(max_new_tokens=24), pieces.append)[0]
        assert "".join(pieces) == answer_text(base.tokenizer, ids)
        assert all(pieces)
        assert len(pieces) > 1


def test_faults_are_listed_together() -> None:
    base = tiny_base(max_position_embeddings=20)
    with pytest.raises(ConfigError) as error:
        generate_ids(base, None, [[], [1] * 15, [1] * 3], [-1] * 3, GenerationConfig(max_new_tokens=10))
    assert "prompt 1 is empty" in str(error.value)
    assert "prompt 2 has 15 tokens" in str(error.value)
    assert "prompt 3" not in str(error.value)
    with pytest.raises(RoutingError, match="as many slots"):
        generate_ids(base, None, [[1]], [-1, -1], GenerationConfig())
    with pytest.raises(RoutingError, match="need a bank"):
        generate_ids(base, None, [[1]], [0], GenerationConfig(max_new_tokens=4))
    with pytest.raises(ConfigError, match="streaming takes one prompt"):
        generate_ids(base, None, [[1], [2]], [-1, -1], GenerationConfig(max_new_tokens=4), print)


def test_logits_that_are_not_numbers_stop_the_answer() -> None:
    base = tiny_base()
    base.model.lm_head.weight.data[3, 0] = float("nan")
    with pytest.raises(ModelError, match="not numbers"):
        generate_ids(base, None, [[1, 2]], [-1], GenerationConfig(max_new_tokens=4))


def test_pad_left() -> None:
    ids, mask = pad_left([[1, 2, 3], [4]], 0, torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
