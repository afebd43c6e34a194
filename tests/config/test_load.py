"""Knobs from YAML, mappings and flags: what is accepted, what is a fault, and what the message says."""

from pathlib import Path
from typing import Any

import pytest

from lorafleet.config import (
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
    dump_sections,
    known_names,
    load_sections,
    switches,
)
from lorafleet.config.yaml_text import parse_scalar
from lorafleet.errors import ConfigError

TRAIN = (ModelConfig, DataConfig, LoraConfig, TrainingConfig, ValidationConfig, RunConfig)
LORA = (LoraConfig,)
NEEDED = {"data": "rows.jsonl", "output_dir": "out"}


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "run.yml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fault(sections: Any, source: Any = None, **knobs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_sections(sections, source, knobs)
    return str(caught.value)


def test_defaults_need_only_what_has_no_default() -> None:
    _, data, lora, training, _, run = load_sections(TRAIN, None, NEEDED)
    assert (data.data, run.output_dir) == ("rows.jsonl", "out")
    assert lora == LoraConfig()
    assert training == TrainingConfig()


def test_knobs_override_the_file_whatever_name_each_uses(tmp_path: Path) -> None:
    path = write(tmp_path, "data: rows.jsonl\noutput-dir: out\nlora_rank: 4\nlr: 1e-4\n")
    _, _, lora, training, _, run = load_sections(TRAIN, path, {"r": 32})
    assert (lora.r, training.learning_rate, run.output_dir) == (32, 1e-4, "out")


SWITCHES = {name for section in TRAIN for key in section.model_fields for name in switches(section, key)}


@pytest.mark.parametrize("name", sorted(set(known_names(TRAIN)) - SWITCHES))
def test_every_name_is_accepted_with_dashes_and_underscores(name: str) -> None:
    key = known_names(TRAIN)[name]
    home = next(section for section in TRAIN if key in section.model_fields)
    default = home.model_fields[key].get_default()
    value = "given" if home.model_fields[key].is_required() else default
    needed = {k: v for k, v in NEEDED.items() if k != key}
    for spelling in (name, name.replace("_", "-")):
        filled = dict(zip(TRAIN, load_sections(TRAIN, needed | {spelling: value}, {}), strict=True))
        assert getattr(filled[home], key) == value


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("completion_only_loss", True, "completion"),
        ("completion-only-loss", False, "all"),
        ("assistant_only_loss", True, "assistant"),
        ("assistant_only_loss", False, "all"),
    ],
)
def test_a_switch_of_other_tools_stands_for_a_value(name: str, value: bool, expected: str) -> None:
    (data,) = load_sections((DataConfig,), {"data": "x", name: value}, {})
    assert data.loss_on == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"completion_only_loss": True, "assistant_only_loss": False}, "completion"),
        ({"completion_only_loss": False, "assistant_only_loss": True}, "assistant"),
        ({"completion_only_loss": False, "assistant_only_loss": False}, "all"),
        ({"completion_only_loss": None, "assistant_only_loss": True}, "assistant"),
        ({"assistant_only_loss": False, "loss_on": "completion"}, "completion"),
        ({"completion_only_loss": None}, "assistant"),
    ],
)
def test_a_switch_that_is_off_says_least(given: dict[str, Any], expected: str) -> None:
    (config,) = load_sections((DataConfig,), {"data": "x", **given}, {})
    assert config.loss_on == expected


def test_a_switch_that_is_no_switch_is_a_fault() -> None:
    with pytest.raises(ConfigError, match="completion_only_loss = 'yes': should be true or false"):
        load_sections((DataConfig,), {"data": "x", "completion_only_loss": "yes"}, {})
    with pytest.raises(ConfigError, match="loss_on is given twice"):
        load_sections((DataConfig,), {"data": "x", "completion_only_loss": True, "assistant_only_loss": True}, {})


def test_a_shared_key_goes_to_every_section_that_has_it() -> None:
    training, generation = load_sections((TrainingConfig, GenerationConfig), None, {"seed": 7})
    assert (training.seed, generation.seed) == (7, 7)


def test_a_key_beats_the_other_name_of_another_knob() -> None:
    assert known_names((TrainingConfig, EvaluationConfig))["batch_size"] == "batch_size"
    assert known_names((TrainingConfig,))["batch_size"] == "per_device_train_batch_size"


def test_all_faults_come_at_once_with_name_value_place_and_remedy(tmp_path: Path) -> None:
    path = write(tmp_path, "r: 0\nleaning_rate: 1\nbias: al\nlora: {alpha: 3}\nexclude_modules: [3]\n")
    message = fault(TRAIN, path, lr="fast", rank_pattern={"q_proj": "x"})
    for part in (
        "9 faults",
        f"r = 0 in {path}, line 1: should be greater than or equal to 1",
        f"unknown key 'leaning_rate' in {path}, line 2; did you mean 'learning_rate'?",
        f"bias = 'al' in {path}, line 3: should be 'none', 'all' or 'lora_only'; did you mean 'all'?",
        f"unknown key 'lora' in {path}, line 4; keys are flat: move alpha to the top level",
        f"exclude_modules = [3] in {path}, line 5: 0: should be a valid string",
        "lr = 'fast': should be a valid number",
        "rank_pattern = {'q_proj': 'x'}: q_proj: should be a valid integer",
        "data or dataset is required: A file",
        "output_dir or output is required",
    ):
        assert part in message


def test_the_same_knob_under_two_names_is_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path, "r: 4\nrank: 8\n")
    assert f"r is given twice: 'r' in {path}, line 1 and 'rank' in {path}, line 2" in fault(LORA, path)
    assert "lora_alpha is given twice: 'alpha' and 'lora-alpha'" in fault(LORA, None, **{"alpha": 1, "lora-alpha": 1})


def test_a_fault_of_a_shared_knob_is_told_once() -> None:
    assert fault((TrainingConfig, GenerationConfig), None, seed=-1).count("seed = -1") == 1


def test_true_is_no_number() -> None:
    assert "r = True: should be a number" in fault(LORA, {"r": True})


def test_rules_across_knobs_are_told() -> None:
    message = fault((ValidationConfig,), {"eval_strategy": "no", "early_stopping_patience": 2})
    assert message == "early_stopping_patience needs evaluations; set eval_strategy to steps or epoch"


def test_paths_are_text_and_other_sources_are_refused() -> None:
    assert load_sections((RunConfig,), None, {"output_dir": Path("a") / "b"})[0].output_dir == str(Path("a/b"))
    assert "not int" in fault(LORA, 3)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("data: a\nr: [1\nb: c", "line 3, column 2: expected ',' or ']'"),
        ("r: 1\n\tr: 2", "line 2, column 1: found character '\\t'"),
        ("r: 1\nr: 2", "line 2, column 1: key 'r' is already on line 1"),
        ("- r", "line 1: expected lines of the form 'key: value'"),
        ("r: &a [*a", "line 1"),
        ("r: !!python/object/apply:os.system ['true']", "line 1, column 4: could not determine a constructor"),
        ("? [a]\n: b", "line 1, column 3: found unhashable key"),
        ("r: 1\n---\nr: 2", "line 2, column 1: but found another document"),
        (b"r: \x00", "not a YAML text: special characters are not allowed"),
        (b"\xff\xfe\x00", "not a YAML text"),
        ("r: " + "[" * 9000, "nested too deeply"),
        ("r: " + "1" * 5000, "digits"),
        (b"x" * (1 << 20) + b"x", "1,048,577 bytes"),
    ],
)
def test_broken_yaml_names_the_place(tmp_path: Path, content: str | bytes, part: str) -> None:
    path = write(tmp_path, content)
    message = fault(LORA, path)
    assert message.startswith(str(path))
    assert part in message


def test_keys_twice_are_told_together(tmp_path: Path) -> None:
    message = fault(LORA, write(tmp_path, "r: 1\nr: 2\nlora_alpha: 8\nr: 3\nlora_alpha: 8"))
    assert "3 faults" in message and message.count("'r' is already on line 1") == 2 and "on line 3" in message


def test_a_flags_mapping_has_each_key_once() -> None:
    assert parse_scalar("{r: [4, 8]}") == {"r": [4, 8]}
    with pytest.raises(ValueError, match="not valid YAML: line 1, column 11: key 'r' is already on line 1"):
        parse_scalar("{r: [4],  r: [8]}")


def test_missing_files_suggest_their_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "r: 1")
    assert "does not exist; did you mean 'run.yml'?" in fault(LORA, tmp_path / "rn.yml")
    assert "is a folder" in fault(LORA, tmp_path)


@pytest.mark.parametrize(
    "content", ["", "# only a comment\n", "\ufeffr: 8\n", "r: 8\r\n", '{"r": 8}', b"\xff\xfer\x00:\x00 \x008\x00"]
)
def test_odd_but_good_files(tmp_path: Path, content: str | bytes) -> None:
    assert load_sections(LORA, write(tmp_path, content), {})[0].r == 8


def test_yaml_words_mean_what_they_say(tmp_path: Path) -> None:
    path = write(
        tmp_path, "data: yes\noutput: 2024-01-01\neval_strategy: no\nlr: 1e-4\nwarmup_steps: 010\noverwrite: true\n"
    )
    _, data, _, training, validation, run = load_sections(TRAIN, path, {})
    assert (data.data, run.output_dir, validation.eval_strategy, run.overwrite) == ("yes", "2024-01-01", "no", True)
    assert (training.learning_rate, training.warmup_steps) == (1e-4, 10)


def test_what_is_dumped_reads_back_equal(tmp_path: Path) -> None:
    odd = {
        "data": "no",
        "output_dir": "1e-4",
        "revision": "0x1",
        "prompt_template": "a: {text}\n中文\x85 # no\t'\"",
        "target_modules": ["q_proj", "1"],
        "rank_pattern": {"no": 3, "12": 2},
        "alpha_pattern": {"^a.*: b": 1e-8},
        "learning_rate": 1e-12,
        "resume_from_checkpoint": "true",
        "system_prompt": "null",
    }
    sections = load_sections(TRAIN, odd, {})
    assert load_sections(TRAIN, write(tmp_path, dump_sections(*sections)), {}) == sections


def test_sections_that_contradict_each_other_are_not_dumped() -> None:
    with pytest.raises(ConfigError, match="seed is 1 in one section and 2 in GenerationConfig"):
        dump_sections(TrainingConfig(seed=1), GenerationConfig(seed=2))


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("target_modules", "*_proj"),
        ("target_modules", ["q_proj", "*_proj"]),
        ("exclude_modules", ["*_proj"]),
        ("rank_pattern", {"*_proj": 4}),
        ("alpha_pattern", {"*_proj": 4}),
    ],
)
def test_what_is_no_regex_is_named_with_its_knob(knob: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{knob}: '\*_proj' is no valid regex: .*written \.\* \(\.\*_proj\)"):
        load_sections((LoraConfig,), None, {knob: value})


def test_a_pattern_that_is_a_regex_by_itself_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank_pattern: '\(\?i\)Q_PROJ' is no valid regex: global flags"):
        load_sections((LoraConfig,), None, {"rank_pattern": {"(?i)Q_PROJ": 4}})
