"""Chat templates that behave like those of well-known models, and tokenizers of several kinds, for tests."""

from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHATML, tiny_tokenizer

LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# Earlier answers lose their thinking, the last one always has a thinking block: not prefix-stable.
QWEN3 = """{%- set ns = namespace(last_query=messages | length - 1, looking=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.looking and message.role == 'user' and not message.content.startswith('<tool_response>') %}
        {%- set ns.looking = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or thoughts) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thoughts + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

MARKED = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

MARKED_WITHOUT_END = MARKED.replace(
    "{{- message.content + '<|im_end|>' }}{% endgeneration %}\n        {{- '\\n' }}",
    "{{- message.content }}{% endgeneration %}\n        {{- '<|im_end|>\\n' }}",
)

# As R1-like and gpt-oss training templates: the markers enclose the role header.
MARKED_HEADER = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- '<|im_start|>assistant\\n' + message.content + '<|im_end|>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

# Of a model that also sees images: content is a list of parts.
PARTS = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- for part in message.content %}{{- part.text if part.type == 'text' }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

# No system role; the assistant is called model.
GEMMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

# Writes the end-of-text token once, after all turns.
PHI3 = """{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

# The generation prompt opens the thinking, a stored answer does not have it.
R1 = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>' + message['content'].split('</think>')[-1] + eos_token }}
    {%- else %}
        {{- '<|user|>' + message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"""

# The system text moves to the last user turn.
MISTRAL = """{{- bos_token }}
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{%- for message in turns %}
    {%- if message['role'] == 'user' %}
        {%- set last = loop.last or (loop.index0 == turns | length - 2) %}
        {{- '[INST] ' + (system if last else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""

NO_END = """{%- for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "marked": MARKED,
    "marked without end": MARKED_WITHOUT_END,
    "marked header": MARKED_HEADER,
    "parts": PARTS,
    "gemma": GEMMA,
    "phi3": PHI3,
    "r1": R1,
    "mistral": MISTRAL,
    "no end": NO_END,
    "plain": None,
}

_SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
_SPECIAL += ["<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]"]
_NOT_SPECIAL = ["<think>", "</think>", "<tool_response>", "<|fim_prefix|>", "   ", "neologism"]


def with_template(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with many control tokens and the named template."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>", "additional_special_tokens": _SPECIAL[1:]})
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=True) for token in _NOT_SPECIAL])
    if name in ("llama3", "gemma"):
        tokenizer.eos_token = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}[name]
    elif name in ("phi3", "r1", "mistral", "no end", "plain"):
        tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


_TRAINING = ["the quick brown fox jumps over the lazy dog", "user assistant system question answer hello world"] * 4
_KINDS_SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@cache
def _kind_rules(kind: str) -> str:
    if kind == "sentencepiece":  # as Llama 2: a leading space is put before the text, unknown characters become bytes
        vocab_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer: Any = trainers.BpeTrainer(
            vocab_size=500, special_tokens=[*_KINDS_SPECIAL, *vocab_bytes], show_progress=False
        )
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        tokenizer.train_from_iterator(_TRAINING, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    elif kind == "metaspace":  # as newer Llama tokenizers: only the first piece gets the space
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=_KINDS_SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(_TRAINING, trainer)
    elif kind == "unigram":  # its vocabulary contains the control tokens as pieces
        pieces = [(token, 0.0) for token in _KINDS_SPECIAL]
        pieces += [(chr(code), -5.0) for code in [*range(33, 127), 10]] + [("▁", -4.0), ("hello", -3.0)]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.add_special_tokens(_KINDS_SPECIAL)
    elif kind == "nfkc":  # full-width characters become ASCII before control tokens are looked for
        tokenizer = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.add_special_tokens([AddedToken("<|odd|>", special=True, normalized=True)])
    else:
        assert kind == "llama3 split"
        tokenizer = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
        split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*| ?\p{L}+|\s+(?!\S)|\s+"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer.to_str()


KINDS = ("sentencepiece", "metaspace", "nfkc", "llama3 split")


def of_kind(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of another kind with a ChatML template."""
    byte_level = kind in ("nfkc", "llama3 split")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_kind_rules(kind)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>" if byte_level else "</s>",
        unk_token=None if byte_level else "<unk>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
