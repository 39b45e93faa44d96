"""Conversation templates: how the turns of a chat become one prompt (`janus/utils/conversation.py`)."""

from dataclasses import dataclass, field, replace


@dataclass
class Conversation:
    """A chat and the format it is written in.

    Attributes:
        name: Key of the template in `conv_templates`.
        roles: Names of the user and of the assistant.
        sep: What follows the system message and each user turn.
        sep2: What follows each assistant turn.
        stop_str: Strings that end an answer.
        system_message: Comes first, unless empty.
        messages: The turns so far, each a [role, text].
    """

    name: str
    roles: tuple[str, str]
    sep: str
    sep2: str
    stop_str: tuple[str, ...]
    system_message: str = ""
    messages: list[list[str]] = field(default_factory=list)

    def set_system_message(self, system_message: str) -> None:
        self.system_message = system_message

    def append_message(self, role: str, message: str) -> None:
        self.messages.append([role, message])

    def get_prompt(self) -> str:
        """The prompt so far. A turn without text ends at its role and colon, for the model to go on from."""
        prompt = self.system_message + self.sep if self.system_message else ""
        for i, (role, message) in enumerate(self.messages):
            prompt += f"{role}: {message}{(self.sep, self.sep2)[i % 2]}" if message else f"{role}:"
        return prompt

    def copy(self) -> "Conversation":
        return replace(self, messages=[list(message) for message in self.messages])


EOS = "<｜end▁of▁sentence｜>"
conv_templates = {
    template.name: template
    for template in (
        Conversation("deepseek", ("<|User|>", "<|Assistant|>"), "\n\n", EOS, ("<|User|>", EOS)),
        Conversation("deepseek_old", ("User", "Assistant"), "\n\n", EOS, ("User:", EOS)),
    )
}


def get_conv_template(name: str) -> Conversation:
    """A fresh conversation in the format `name`.

    Raises:
        ValueError: There is no such template.
    """
    if name not in conv_templates:
        raise ValueError(f"sft_format must be one of {sorted(conv_templates)}, got {name!r}")
    return conv_templates[name].copy()
