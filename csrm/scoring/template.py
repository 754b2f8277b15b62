"""The template of a prompt: all text that is not a field's. A model that others trained to judge brings its own."""

from dataclasses import asdict, dataclass
from typing import ClassVar

import regex
from pydantic import ConfigDict

from csrm.errors import ConfigError

_PLACEHOLDER = regex.compile(
    r"\{\s*(query|document|doc|passage|title|text|instruction|brand|category|attributes)\s*\}", regex.IGNORECASE
)


@dataclass(frozen=True)
class PromptTemplate:
    """The text before each field of a prompt, and around all of them.

    The prompt is, in this order: opening, market, language, query, retrieved titles; title, brand, category,
    attributes; cue. A query's products share all before the title. One space stands between a text and its field, and
    none where the text ends with a line break. Special tokens of the model's tokenizer, such as <|im_end|>, are read
    as such here, and never in a field. What the tokenizer puts before every text (<bos>) must not be in the opening.

    >>> template = PromptTemplate(query="Query:", title="\\nDocument:", cue="\\nAnswer:")
    >>> template.brand is None  # so that a prompt shows no brand
    True

    Raises:
        ConfigError: a text is empty, ends with a space, or has a placeholder such as {query}.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    query: str
    title: str
    cue: str
    """After the last field; the model's answer follows it, with the text of a label's token."""
    opening: str = ""
    """Before the first field: for example the turn of the system, and the instruction."""
    market: str | None = None
    """null leaves the field out, here and below."""
    language: str | None = None
    retrieved: str = ""
    """Before the first of several retrieved titles, in front of retrieved_title."""
    retrieved_title: str | None = None
    brand: str | None = None
    category: str | None = None
    attributes: str | None = None

    def __post_init__(self) -> None:
        texts = {name: text for name, text in asdict(self).items() if text is not None}
        problems = [f"{name} is empty" for name in ("query", "title", "cue") if not texts[name]]
        for name, text in texts.items():
            if name not in ("opening", "cue") and text.endswith((" ", "\t")):
                problems.append(f"{name} ends with a space, which its field brings itself")
            if placeholder := _PLACEHOLDER.search(text):
                problems.append(f"{name} has {placeholder.group()}, but a field stands after its text by itself")
        if problems:
            raise ConfigError(
                f"template: expected the text before each field; {'; '.join(problems)}. "
                "conf/export_bundle_reranker.yaml shows a template."
            )


BUILT_IN_TEMPLATE = PromptTemplate(
    opening="Task: relevance\n",
    market="Market:",
    language="\nLanguage:",
    query="\nQuery:",
    retrieved="\nRetrieved:",
    retrieved_title="\n-",
    title="\nProduct:",
    brand="\nBrand:",
    category="\nCategory:",
    attributes="\nAttributes:",
    cue="\nRelevant:",
)
"""The template of models that CSRM trains, unless they are configured with another one."""
