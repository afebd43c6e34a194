"""A conversation whose turns different adapters answer."""

import io
import json
from pathlib import Path

import pytest

from lorafleet.cli.main import main
from lorafleet.errors import AdapterError, ConfigError
from lorafleet.serving.chat import Chat
from tests.serving.fleet import TinyFleet


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> TinyFleet:
    return TinyFleet(tmp_path_factory.mktemp("fleet"), 2)


def test_the_conversation_goes_on_under_another_adapter(fleet: TinyFleet) -> None:
    pool = fleet.pool()
    chat = Chat(pool, "a0", max_new_tokens=6)
    first = chat.say("hello there")
    second = chat.say("and now")
    history = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": first.text}]
    history += [{"role": "user", "content": "and now"}]
    assert fleet.pool().generate([history], "a0", max_new_tokens=6) == [second]
    history += [{"role": "assistant", "content": second.text}, {"role": "user", "content": "again"}]
    pool.activate("a0")
    chat.switch("a1")
    assert pool.default == "a0"  # of others who ask the same pool
    assert chat.say("again") == fleet.pool().generate([history], "a1", max_new_tokens=6)[0]


def test_what_was_read_is_not_read_again(fleet: TinyFleet) -> None:
    pool = fleet.pool()
    chat = Chat(pool, "a0", max_new_tokens=6)
    chat.say("hello " * 30)
    row = pool._decoder.rows[0]
    known = len(row.ids)
    chat.pool.submit([*chat.turns, {"role": "user", "content": "x"}], "a0", max_new_tokens=1)
    pool._decoder.waiting.extend(ticket.request for ticket in pool._waiting)
    request = pool._decoder.waiting[0]
    assert row.common(request) > 30 and row.common(request) >= known - 8
    request.owner = "another"
    assert row.common(request) == 0


def test_comparing_leaves_the_conversation_alone(fleet: TinyFleet) -> None:
    chat = Chat(fleet.pool(), max_new_tokens=6)
    with pytest.raises(ConfigError, match="nothing has been asked yet"):
        chat.compare(["a0", "a1"])
    reply = chat.say("hello there")
    turns = list(chat.turns)
    both = chat.compare(["base", "a1"])
    assert both[0] == reply and both[1].text != reply.text and chat.turns == turns
    assert chat.compare(["a0", "a1"], "other") != both and chat.turns == turns
    with pytest.raises(AdapterError, match="a7"):
        chat.switch("a7")
    assert chat.adapter is None


def test_the_oldest_turns_leave_when_it_grows_too_long(fleet: TinyFleet) -> None:
    chat = Chat(fleet.pool(), max_new_tokens=4)
    limit = chat.pool.base.model.config.max_position_embeddings
    for number in range(8):
        chat.say(f"{number} " + "hello " * (limit // 12))
    assert 2 <= len(chat.turns) < 16 and chat.turns[-2]["content"].startswith("7 ")
    with pytest.raises(ConfigError, match="tokens"):
        chat.say("hello " * limit)


class Talk:
    """``lorafleet chat`` on lines of a file."""

    def __init__(self, fleet: TinyFleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.fleet, self.monkeypatch, self.capsys = fleet, monkeypatch, capsys

    def __call__(self, lines: str, *flags: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        arguments = ["chat", "--model", str(self.fleet.base_folder), "--registry", self.fleet.registry.location]
        code = main([*arguments, "--max-new-tokens", "6", *flags])
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err


@pytest.fixture
def talk(fleet: TinyFleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    return Talk(fleet, monkeypatch, capsys)


def test_lines_of_a_file(talk: Talk) -> None:
    lines = "hello there\n\n/adapter a1\n/adapter\nagain\n/compare base a0\n/reset\n/help\n/quit\nnever\n"
    code, out, err = talk(lines)
    assert code == 0, err
    for shown in ("base. /help shows the commands", "a1 answers", "a0 (a0:1)", "/compare A B"):
        assert shown in out
    code, out, _ = talk(lines, "--json", "--adapter", "a0")
    answers = [[reply["adapter"] for reply in turn["answers"]] for turn in json.loads(out)["turns"]]
    assert code == 0 and answers == [["a0:1"], ["a1:1"], [None, "a0:1"]]


@pytest.mark.parametrize("text", ["what's new", "don't and can't", 'say "x"  twice', "a \\ b # c"])
def test_the_text_to_compare_stays_as_it_is(talk: Talk, text: str) -> None:
    code, out, err = talk(f"/compare 'a0'  \"a1\" {text}\n", "--json")
    assert code == 0, err
    (turn,) = json.loads(out)["turns"]
    assert turn["question"] == text and [reply["adapter"] for reply in turn["answers"]] == ["a0:1", "a1:1"]


@pytest.mark.parametrize(
    ("lines", "exit_code", "said"),
    [
        ("/adapter nobody\n", 1, "there is no adapter folder at nobody"),
        ("/compare a0\n", 2, "/compare takes two adapters"),
        ("/compare 'a0 a1\n", 2, "No closing quotation"),
        ("/swich a0\n", 2, "there is no command /swich"),
    ],
)
def test_a_command_that_is_wrong_ends_a_file(talk: Talk, lines: str, exit_code: int, said: str) -> None:
    code, _, err = talk(lines + "hello\n")
    assert code == exit_code and err.count(said) == 1


def test_a_missing_adapter_is_named_before_the_base_is_loaded(talk: Talk, tmp_path: Path) -> None:
    code, _, err = talk("hello\n", "--adapter", str(tmp_path / "absent"))
    assert code == 1 and "there is no adapter folder" in err
