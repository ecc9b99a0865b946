"""Conversations to text by the chat template of a model, and that text to tokens.

    template = ChatTemplate.from_metadata(meta, tokenizer)
    text = template.render([{"role": "user", "content": "Hello"}])
    ids = encode_chat(tokenizer, text)

The text already holds the special tokens, by their spelling: it is tokenized with
`parse_special=True`, and BOS is added only where the template has not written it. `encode_chat`
does both. As everywhere else, a control token spelled out in a message becomes that token.

Templates come with model files, from strangers: they run in `pykvq.template_sandbox`, which is
imported with the first of them, since jinja2 takes its time.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from pykvq.errors import ChatTemplateError
from pykvq.tokenizer import Tokenizer
from pykvq.vocab import Metadata, is_encodable, require_string

_KEY = "tokenizer.chat_template"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The template used for models that have none."""


class ChatTemplate:
    """A chat template, compiled once; safe to share between threads."""

    def __init__(self, source: str, bos_token: str, eos_token: str) -> None:
        """Compiles a template.

        Args:
            source: the jinja2 source, with the functions that transformers gives to templates:
                `raise_exception`, `strftime_now` and a `tojson` that does not escape for HTML.
            bos_token: spelling of the token that begins a sequence, or "".
            eos_token: spelling of the token that ends a sequence, or "".

        Raises:
            ChatTemplateError: the source is not text or not a valid template.
        """
        from pykvq.template_sandbox import TemplateSandbox

        if not is_encodable(source):
            raise ChatTemplateError("The chat template holds bytes that are not UTF-8.")
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._sandbox = TemplateSandbox()
        try:
            self._template = self._sandbox.compile_template(source)
        except Exception as error:  # jinja2 and Python's compiler raise many kinds
            raise ChatTemplateError(
                f"The chat template cannot be compiled: {_reason(error)}."
            ) from error

    @classmethod
    def from_metadata(
        cls, meta: Metadata, tokenizer: Tokenizer, name: str | None = None
    ) -> ChatTemplate:
        """The chat template of a GGUF file; ChatML, with a warning, for a file without one.

        Args:
            meta: the file's metadata.
            tokenizer: the file's tokenizer, for the spelling of BOS and EOS.
            name: which of the file's named templates to take, such as "tool_use"; by default the
                unnamed one.

        Raises:
            ChatTemplateError: the template is not valid, or there is none of this name.
            TokenizerError: the template is not a string.
        """
        key = _KEY if name is None else f"{_KEY}.{name}"
        if key in meta:
            source = require_string(meta, key)
        elif name is not None:
            known = ", ".join(template_names(meta)) or "none"
            raise ChatTemplateError(
                f"The model has no chat template named {name!r}; the names it has are: {known}."
            )
        else:
            warnings.warn(
                "The model has no chat template; ChatML is used, which it may not have been "
                "trained on.",
                stacklevel=2,
            )
            source = CHATML
        return cls(source, _spelling(tokenizer, tokenizer.bos), _spelling(tokenizer, tokenizer.eos))

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        **kwargs: object,
    ) -> str:
        """Writes a conversation as the text that the model was trained on.

        Args:
            messages: the turns, each with "role" and "content", and with whatever else the
                template reads.
            add_generation_prompt: whether the text ends with the beginning of the model's turn.
            **kwargs: further variables of the template, such as `tools` or `enable_thinking`.

        Raises:
            ChatTemplateError: the template refuses the conversation, fails, or exceeds the
                limits of `pykvq.template_sandbox`.
        """
        from pykvq.template_sandbox import RefusalError

        variables: dict[str, object] = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            **self._tokens,
            **kwargs,
        }
        try:
            return self._sandbox.render(self._template, variables)
        except RefusalError as error:
            raise ChatTemplateError(
                f"The chat template refuses the conversation: {_reason(error)}."
            ) from error
        except Exception as error:  # a template can provoke any kind
            raise ChatTemplateError(
                f"The chat template cannot be rendered: {_reason(error)}."
            ) from error


def template_names(meta: Metadata) -> list[str]:
    """The names of a file's named templates, sorted."""
    prefix = _KEY + "."
    return sorted(key.removeprefix(prefix) for key in meta if key.startswith(prefix))


def encode_chat(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenizes a rendered conversation.

    Spellings of special tokens become these tokens. BOS is put in front where the model wants it
    and the template has not; EOS is not appended, since the model is to go on.

    Args:
        tokenizer: the tokenizer.
        text: what `ChatTemplate.render` gave.
    """
    ids = tokenizer.encode(text, add_special=False, parse_special=True)
    if tokenizer.add_bos and tokenizer.bos is not None and ids[:1] != [tokenizer.bos]:
        ids.insert(0, tokenizer.bos)
    return ids


def _spelling(tokenizer: Tokenizer, token: int | None) -> str:
    if token is None:
        return ""
    return tokenizer.token_bytes(token, special=True).decode("utf-8", "replace")


def _reason(error: Exception) -> str:
    """What went wrong, fit to stand inside of a sentence."""
    text = str(error).strip().rstrip(".")
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return text or type(error).__name__
