"""Text/label rows as a task for a language model: a prompt that asks for the label, an answer that is the label."""

import re
from collections.abc import Iterable

from lorafleet.data.conversation import Conversation, Labelled, Turn
from lorafleet.errors import ConfigError, did_you_mean

# Naming the labels helps an untrained model; more than these would make the prompt longer than the text.
MAX_NAMED_LABELS = 20

NAMING_TEMPLATE = "Classify the text. Answer with one of these labels: {labels}.\n\nText: {text}"
PLAIN_TEMPLATE = "Classify the text. Answer with its label.\n\nText: {text}"

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


class LabelPrompt:
    """Turns a text into the question for its label.

    Args:
        labels: All labels of the task.
        template: Text with ``{text}`` and, if wanted, ``{labels}``. The default names the labels when there are at most
            ``MAX_NAMED_LABELS``.

    Raises:
        ConfigError: The template lacks ``{text}`` or has another placeholder.
    """

    def __init__(self, labels: Iterable[str], template: str | None = None) -> None:
        self.labels = tuple(labels)
        self.template = template or (NAMING_TEMPLATE if len(self.labels) <= MAX_NAMED_LABELS else PLAIN_TEMPLATE)
        check_prompt_template(self.template)

    def question(self, text: str) -> str:
        """Fill the template; braces in ``text`` stay as they are."""
        values = {"text": text, "labels": ", ".join(self.labels)}
        return _PLACEHOLDER.sub(lambda found: values[found[1]], self.template)

    def conversation(self, row: Labelled) -> Conversation:
        """The row as a user turn that asks and an assistant turn that answers with the label."""
        return Conversation((Turn("user", self.question(row.text)), Turn("assistant", row.label)))


def check_prompt_template(template: str) -> None:
    """Check the placeholders of a prompt template.

    Raises:
        ConfigError: ``{text}`` is missing, or there is another placeholder than ``{text}`` and ``{labels}``.
    """
    names = _PLACEHOLDER.findall(template)
    unknown = [name for name in names if name not in ("text", "labels")]
    if unknown:
        hint = did_you_mean(unknown[0], ("text", "labels"))
        raise ConfigError(f"prompt_template has {{{unknown[0]}}}; only {{text}} and {{labels}} are filled in{hint}")
    if "text" not in names:
        raise ConfigError(f"prompt_template = {template!r} has no {{text}}, so every row would ask the same")


def odd_labels(labels: Iterable[str]) -> list[str]:
    """Labels that differ from another one only in case or white space: usually one label, written in two ways."""
    seen: dict[str, list[str]] = {}
    for label in labels:
        seen.setdefault(" ".join(label.casefold().split()), []).append(label)
    return [" / ".join(map(repr, same)) for same in seen.values() if len(same) > 1]
