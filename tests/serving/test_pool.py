"""Requests of many adapters answered together, as each would be alone, while adapters come, go and change."""

import random
from pathlib import Path

import pytest
import torch

from lorafleet.errors import AdapterError, ConfigError
from lorafleet.files.adapter import Adapter
from lorafleet.serving import residents
from lorafleet.serving.pool import AdapterPool, Ticket
from tests.serving.fleet import TinyFleet, write_adapter

NAMES = [f"a{i}" for i in range(8)]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> TinyFleet:
    return TinyFleet(tmp_path_factory.mktemp("fleet"))


def run(pool: AdapterPool, tickets: list[Ticket]) -> None:
    while not all(ticket.done for ticket in tickets):
        pool.step()


def requests(count: int) -> list[tuple[str, str]]:
    """Prompts of different lengths, over eight adapters and the base."""
    return [("hello " * (1 + i % 5) + f"number {i}", ["base", *NAMES][i % 9]) for i in range(count)]


def test_mixed_requests_equal_each_alone_whatever_the_order_batch_and_time(fleet: TinyFleet) -> None:
    asked = requests(32)
    pool = fleet.pool()
    alone = [pool.generate([prompt], name, max_new_tokens=8)[0] for prompt, name in asked]
    prompts, names = [p for p, _ in asked], [n for _, n in asked]
    assert pool.generate(prompts, names, max_new_tokens=8) == alone
    assert len({reply.text for reply in alone}) > 9
    for seed, rows in ((0, 3), (1, 32)):
        order = random.Random(seed).sample(range(32), 32)
        other = fleet.pool(max_requests=rows, max_adapters=3)
        tickets = {}
        for number in order:  # some enter while others are being answered
            tickets[number] = other.submit(prompts[number], names[number], max_new_tokens=8)
            other.step()
        run(other, list(tickets.values()))
        assert [other.reply(tickets[i]) for i in range(32)] == alone


def test_sampling_and_streaming(fleet: TinyFleet) -> None:
    pool = fleet.pool()
    knobs = {"max_new_tokens": 12, "temperature": 1.0, "repetition_penalty": 1.1}
    together = pool.generate(["one two", "three"], ["a1", "a2"], **knobs)
    assert together[1] == pool.generate(["three"], "a2", **knobs)[0]
    pieces: list[str] = []
    assert pool.generate(["one two"], "a1", on_text=pieces.append, **knobs)[0] == together[0]
    assert "".join(pieces) == together[0].text
    assert len(set(pool.generate(["three"] * 4, "a2", **knobs))) > 1


def test_the_one_unused_for_longest_leaves(fleet: TinyFleet) -> None:
    pool = fleet.pool(max_adapters=2)
    for name in ("a0", "a1", "a0", "a2"):
        pool.generate(["hello"], name, max_new_tokens=1)
    assert [resident.label for resident in pool.residents] == ["a0:1", "a2:1"]
    pool.evict("a0")
    assert [resident.label for resident in pool.residents] == ["a2:1"]
    assert not any(resident.users for resident in pool.residents)


def test_more_adapters_than_slots_all_come_in(fleet: TinyFleet) -> None:
    pool = fleet.pool(max_adapters=1, max_requests=4)
    asked = [("a0", 20), ("a1", 2), ("a0", 2), ("a2", 2), ("a0", 2)]
    tickets = [pool.submit("hello", name, max_new_tokens=count) for name, count in asked]
    pool.step()
    # a1 waits for the slot, and the third, which would keep a0 in it, does not go first.
    assert [len(t.request.answer) for t in tickets] == [1, 0, 0, 0, 0]
    run(pool, tickets)
    whole = fleet.pool().generate(["hello"], "a2", max_new_tokens=2)[0]
    assert pool.reply(tickets[3]) == whole


def test_a_name_that_moves_on_leaves_those_in_flight_alone(tmp_path: Path) -> None:
    fleet = TinyFleet(tmp_path, 1)
    pool = fleet.pool()
    old = pool.generate(["hello there"], "a0@prod", max_new_tokens=10)[0]
    running = pool.submit("hello there", "a0@prod", max_new_tokens=10)
    pool.step()
    waiting = pool.submit("hello there", "a0@prod", max_new_tokens=10)
    fleet.add("a0", seed=5)
    after = pool.submit("hello there", "a0@prod", max_new_tokens=10)
    run(pool, [running, waiting, after])
    assert pool.reply(running) == pool.reply(waiting) == old
    new = pool.reply(after)
    assert (old.adapter, new.adapter) == ("a0:1", "a0:2") and old.text != new.text
    fleet.registry.rollback("a0")
    assert pool.generate(["hello there"], "a0@prod", max_new_tokens=10)[0] == old


def test_a_folder_that_is_trained_anew_is_another_adapter(tmp_path: Path) -> None:
    fleet = TinyFleet(tmp_path, 0)
    folder = write_adapter(fleet.base, tmp_path / "own", 1)
    pool = fleet.pool()
    first = pool.generate(["hello"], str(folder), max_new_tokens=8)[0]
    write_adapter(fleet.base, folder, 4)
    assert pool.generate(["hello"], str(folder), max_new_tokens=8)[0].text != first.text


def test_switching_changes_no_weight_of_the_base(fleet: TinyFleet) -> None:
    pool = fleet.pool(max_adapters=2)
    before = {name: p.clone() for name, p in pool.base.model.named_parameters() if "lora_" not in name}
    places = {name: p.data_ptr() for name, p in pool.base.model.named_parameters() if "lora_" not in name}
    pool.generate(["hello"] * 4, ["a0", "a1", "base", "a2"], max_new_tokens=3)
    for name, parameter in pool.base.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name]) and parameter.data_ptr() == places[name]


def test_activate_scale_disable(fleet: TinyFleet) -> None:
    pool = fleet.pool()
    base, own = pool.generate(["hello there"] * 2, ["base", "a3"], max_new_tokens=8)
    assert pool.generate(["hello there"], max_new_tokens=8) == [base]
    pool.activate("a3")
    assert pool.generate(["hello there"], max_new_tokens=8) == [own]
    pool.scale("a3", 0.0)
    assert pool.generate(["hello there"], max_new_tokens=8)[0].text == base.text
    pool.evict("a3")
    assert pool.generate(["hello there"], max_new_tokens=8)[0].text == base.text  # a scale outlasts the slot
    pool.scale("a3", 1.0)
    assert pool.generate(["hello there"], max_new_tokens=8) == [own]
    pool.disable()
    assert pool.generate(["hello there"], max_new_tokens=8) == [base]


def test_a_request_can_be_given_up(fleet: TinyFleet) -> None:
    pool = fleet.pool(max_requests=1)
    first = pool.submit("hello", "a0", max_new_tokens=50)
    second = pool.submit("hello", "a1", max_new_tokens=3)
    pool.step()
    pool.cancel(first)
    run(pool, [second])
    assert pool.reply(second) == fleet.pool().generate(["hello"], "a1", max_new_tokens=3)[0]
    assert not any(resident.users for resident in pool.residents)


def test_one_given_up_is_done(fleet: TinyFleet) -> None:
    pool = fleet.pool(max_requests=1)
    running, waiting = (pool.submit("hello", "a0", max_new_tokens=5) for _ in range(2))
    pool.step()
    for ticket in (running, waiting):
        pool.cancel(ticket)
        assert ticket.done and ticket.request.error is None
    assert len(running.request.answer) == 1 and not pool.reply(running).complete


def test_a_callback_that_raises_ends_its_own_request(fleet: TinyFleet) -> None:
    def broken(text: str) -> None:
        raise BrokenPipeError("the reader has gone")

    pool, names = fleet.pool(), ["a0", "a1", "a2", "a3"]
    alone = [pool.generate(["hello there"], name, max_new_tokens=6)[0] for name in names]
    calls = [None, broken, None, broken]
    tickets = [
        pool.submit("hello there", name, on_text=call, max_new_tokens=6)
        for name, call in zip(names, calls, strict=True)
    ]
    run(pool, tickets)
    for ticket, whole, call in zip(tickets, alone, calls, strict=True):
        if call is None:
            assert pool.reply(ticket) == whole
        else:
            assert isinstance(ticket.request.error, BrokenPipeError)
    with pytest.raises(BrokenPipeError, match="the reader has gone"):
        pool.generate(["hello there"], "a1", on_text=broken, max_new_tokens=6)
    assert not pool._decoder.busy and not any(resident.users for resident in pool.residents)


def test_a_callback_may_give_up_another_request(fleet: TinyFleet) -> None:
    pool = fleet.pool()
    tickets: list[Ticket] = []
    for name, call in (("a0", lambda _: pool.cancel(tickets[1])), ("a1", None), ("a2", None)):
        tickets.append(pool.submit("hello there", name, on_text=call, max_new_tokens=6))
    run(pool, tickets)
    alone = pool.generate(["hello there"] * 2, ["a0", "a2"], max_new_tokens=6)
    assert [pool.reply(tickets[0]), pool.reply(tickets[2])] == alone
    assert len(tickets[1].request.answer) < 6 and not any(resident.users for resident in pool.residents)


def test_a_callback_may_give_up_a_request_that_has_just_failed(
    fleet: TinyFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = fleet.pool()
    tickets = [pool.submit("hello there", "a0", max_new_tokens=6, on_text=lambda _: pool.cancel(tickets[1]))]
    pool.step()

    def scarce(_: int) -> None:
        raise MemoryError("no memory for keys and values")

    monkeypatch.setattr(pool._decoder.cache, "grow", scarce)
    tickets.append(pool.submit("hello there", "a1", max_new_tokens=400))
    run(pool, tickets)
    assert isinstance(tickets[1].request.error, MemoryError)
    assert not any(resident.users for resident in pool.residents)


@pytest.mark.parametrize("error", [PermissionError("adapter_config.json"), torch.OutOfMemoryError("no room")])
def test_an_adapter_that_cannot_be_brought_in_fails_its_own_request(
    fleet: TinyFleet, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, read = fleet.pool(), residents.load_adapter
    alone = pool.generate(["hello"] * 2, ["a0", "a2"], max_new_tokens=3)
    pool.evict("a2")

    def load(folder: Path) -> Adapter:
        if folder == pool.source.find("a1").folder:
            raise error
        return read(folder)

    monkeypatch.setattr(residents, "load_adapter", load)
    tickets = [pool.submit("hello", name, max_new_tokens=3) for name in ("a0", "a1", "a2")]
    assert tickets[1] in pool.step() and tickets[1].request.error is error
    run(pool, tickets)
    assert [pool.reply(tickets[0]), pool.reply(tickets[2])] == alone


def test_an_interrupted_load_loses_no_request(fleet: TinyFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> Adapter:
        raise KeyboardInterrupt

    pool = fleet.pool()
    tickets = [pool.submit("hello", name, max_new_tokens=3) for name in ("a0", "a1", "a2")]
    with monkeypatch.context() as patched:
        patched.setattr(residents, "load_adapter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.step()
    run(pool, tickets)
    assert [pool.reply(ticket) for ticket in tickets] == fleet.pool().generate(
        ["hello"] * 3, ["a0", "a1", "a2"], max_new_tokens=3
    )


def test_another_bases_adapter_is_refused_with_both_hashes(fleet: TinyFleet, tmp_path: Path) -> None:
    other = TinyFleet(tmp_path, 1)
    config = other.base_folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"remark": 1,', 1))
    pool = other.pool()
    with pytest.raises(AdapterError, match=rf"hash {pool.base.weights_hash[:12]}.*\n?.*{other.base.weights_hash[:12]}"):
        pool.generate(["hello"], "a0", max_new_tokens=1)
    # Beside it others are answered, and nothing is left behind.
    assert pool.generate(["hello"], "base", max_new_tokens=1)
    assert not pool.residents
    trusting = AdapterPool(pool.base.source, registry=other.registry.location, check_base=False)
    assert trusting.generate(["hello"], "a0", max_new_tokens=1)


def test_faults_are_named_together_before_anything_is_answered(fleet: TinyFleet) -> None:
    pool = fleet.pool()
    with pytest.raises(AdapterError, match=r"(?s)a00.*did you mean 'a0'.*nothing") as caught:
        pool.generate(["hello"] * 3, ["a00", "nothing", "a1"], max_new_tokens=1)
    assert "a1" not in str(caught.value).replace("did you mean", "")
    with pytest.raises(ConfigError, match="2 prompts need as many adapters, or one for all; got 1"):
        pool.generate(["hello", "there"], ["a1"])
    with pytest.raises(ConfigError, match="prompt 1 has .* tokens"):
        pool.generate(["hello " * 3000], "a1")
    with pytest.raises(ConfigError, match="max_new_token.*did you mean 'max_new_tokens'"):
        pool.generate(["hello"], "a1", max_new_token=3)
    with pytest.raises(ConfigError, match="streaming takes one prompt"):
        pool.generate(["hello", "there"], on_text=print)
    with pytest.raises(ConfigError, match="max_adapters"):
        fleet.pool(max_adapters=0)
