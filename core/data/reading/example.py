"""What a document is before it is tokens: segments of text and control symbols, some of them trained.

Plain text is one segment. Chats and preferences are many: the template of `core.data.chat` decides
which symbols stand between them and which of them a model is trained on.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """A stretch of a document.

    Attributes:
        text: Text, or the name of a control symbol such as "<|user|>".
        control: Whether `text` names a control symbol; text never becomes one.
        trained: Whether its tokens are targets that count.
    """

    text: str
    control: bool = False
    trained: bool = True
