"""The commands `run` and `chat`: text to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from pykvq import cli_options as options
from pykvq import cli_sampling
from pykvq.console import UsageError, counted, fail, notice, print_json, size, warn
from pykvq.errors import ContextError

if TYPE_CHECKING:
    from pykvq.generation import Generation, Stream
    from pykvq.model import Model
    from pykvq.native_session import SessionStats
    from pykvq.sampling_params import SamplingParams
    from pykvq.session import Session

#: Left for the answer to a long prompt if -n says nothing.
_ANSWER = 1024

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

_EMPTY = "The prompt is empty, expected some text."
_COMMANDS = "/reset begins anew, /exit or Ctrl-D ends, /help says this, Ctrl-C interrupts"


# ---- run ------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Writes one text or one answer."""
    options.check_scheme(args.kv)
    prompt = options.read_prompt(args)
    with options.open_model(args, kv=args.kv, **options.session_options(args)) as model:
        params = cli_sampling.sampling_params(args, model.sampling_defaults)
        ids, form = _encode(args, model, prompt)
        limit = cli_sampling.max_tokens(args)
        needed = len(ids) + (_ANSWER if limit is None else limit)
        n_ctx = options.context_size(args, model, max(options.RUN_CONTEXT, needed))
        session = options.open_session(args, model, n_ctx)
        with options.checked():
            stream = session.generate(
                ids, limit, params=params, stop=args.reverse_prompt, stream=True
            )
        _announce(args, model, session, form)
        interrupted = _write(stream, quiet=args.json)
        result = stream.result
        if args.json:
            print_json(_as_json(model, session, result))
        _conclude(result, session.stats, params.greedy)
        if _is_cut(result, limit):
            warn(f"The context of {n_ctx} tokens is full; a larger one can be had with -c.")
    return EXIT_INTERRUPTED if interrupted else 0


def _encode(args: argparse.Namespace, model: Model, prompt: str) -> tuple[list[int], str]:
    """The tokens of the prompt, and how it was understood."""
    from pykvq.chat import encode_chat

    chat = model.has_chat_template if args.conversation is None else args.conversation
    if chat:
        if not prompt:
            raise UsageError(_EMPTY)
        messages = [*_system(args), {"role": "user", "content": prompt}]
        text, form = model.chat_template.render(messages), "answering by the chat template"
    elif args.system_prompt is not None:
        raise UsageError("A system message needs a chat template, but none is used.")
    else:
        text, form = prompt, "continuing the text"
    ids = encode_chat(model.tokenizer, text)
    if not ids:
        raise UsageError(_EMPTY)
    return ids, form


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    if args.system_prompt is None:
        return []
    return [{"role": "system", "content": args.system_prompt}]


def _announce(args: argparse.Namespace, model: Model, session: Session, form: str) -> None:
    s = session.stats
    notice(
        f"{model.info.name}; KV cache {_cache(args, s)}"
        f"{options.profile_note(model, s.uses_profile)}; {options.device_note(model, s)}; {form}."
    )
    options.say_why_cpu(args, s)
    options.warn_of_key_bias(model, [s.scheme])


def _cache(args: argparse.Namespace, s: SessionStats) -> str:
    """The scheme, what was asked of it and what came of that."""
    from pykvq.native import block_tokens

    scheme = [s.scheme]
    if args.kv_bits is not None:
        scheme.append(f"--kv-bits {args.kv_bits:g}")
    if args.asymkv_layers is not None:
        scheme.append("--asymkv-layers {},{}".format(*args.asymkv_layers))
    notes = [f"{' '.join(scheme)} ({s.bits_sealed:.2f} bits per sealed element)"]
    if s.sinks or s.window:
        notes.append(f"{s.sinks} first and {s.window} last tokens in f16")
    if s.kv_topk:
        block = block_tokens()
        blocks = -(-s.kv_topk // block)
        notes.append(f"{blocks * block} sealed tokens read by each written one")
    return ", ".join(notes)


def _write(stream: Stream, quiet: bool = False) -> bool:
    """Writes a text as it comes, up to its end or Ctrl-C; returns whether that ended it."""
    interrupted, text = False, "\n"
    try:
        for chunk in stream:
            if chunk.text and not quiet:
                text = chunk.text
                sys.stdout.write(text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        stream.close()
    if not text.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    return interrupted


def _is_cut(result: Generation, limit: int | None) -> bool:
    """Whether the context was full before the text had ended."""
    return result.finish_reason == "length" and limit != len(result.tokens)


def _conclude(result: Generation, cache: SessionStats, greedy: bool) -> None:
    done = result.stats
    reused = f" ({done.n_reused} reused)" if done.n_reused else ""
    held = done.n_reused + done.n_evaluated
    stopped_at = f"{held} of " if held < done.n_prompt else ""
    profile = f" and profile {size(cache.bytes_tables)}" if cache.bytes_tables else ""
    notice(
        f"prompt {stopped_at}{counted(done.n_prompt, 'token')}{reused},"
        f" {done.prompt_per_second:.1f}/s;"
        f" written {counted(done.n_generated, 'token')}, {done.decode_per_second:.1f}/s;"
        f" KV cache {size(cache.bytes_kv)} for {cache.n_ctx} tokens{profile},"
        f" {cache.bits_full:.2f} bits per element; "
        f"{'greedy' if greedy else f'seed {result.seed}'}."
    )


def _as_json(model: Model, session: Session, result: Generation) -> dict[str, Any]:
    from dataclasses import asdict

    done = result.stats
    return {
        "model": model.info.name,
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        "timings": {
            **asdict(done),
            "prompt_per_second": done.prompt_per_second,
            "decode_per_second": done.decode_per_second,
        },
        "kv": asdict(session.stats),
    }


# ---- chat -----------------------------------------------------------------------------------


def chat(args: argparse.Namespace) -> int:
    """Talks until /exit or the end of stdin."""
    options.check_scheme(args.kv)
    with options.open_model(args, kv=args.kv, **options.session_options(args)) as model:
        params = cli_sampling.sampling_params(args, model.sampling_defaults)
        n_ctx = options.context_size(args, model, options.CHAT_CONTEXT)
        session = options.open_session(args, model, n_ctx)
        _announce(args, model, session, _COMMANDS)
        conversation = _Conversation(args, model, session, params)
        interactive, unanswered = sys.stdin.isatty(), 0
        while True:
            try:
                line = input("> " if interactive and sys.stdout.isatty() else "")
                if line.strip() == "/exit":
                    raise EOFError
                if line.strip() == "/reset":
                    conversation.reset()
                elif line.strip() == "/help":
                    notice(f"{_COMMANDS}.")
                elif line.strip():
                    unanswered += not conversation.answer(line)
            except EOFError:
                return EXIT_ERROR if unanswered and not interactive else 0
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print(file=sys.stderr)


class _Conversation:
    """The turns so far, and their tokens in the session."""

    def __init__(
        self, args: argparse.Namespace, model: Model, session: Session, params: SamplingParams
    ) -> None:
        self._args = args
        self._model = model
        self._session = session
        self._params = params
        self.reset()

    def reset(self) -> None:
        """Forgets all turns."""
        self._messages = _system(self._args)
        self._text = ""
        self._ids: list[int] = []

    def answer(self, line: str) -> bool:
        """Writes the answer to a line; a line that cannot be answered is forgotten.

        Returns:
            Whether there is an answer; if not, it has said why.

        Raises:
            KeyboardInterrupt: Ctrl-C ended the answer; what there is of it counts as the answer.
        """
        try:
            options.check_line(line)
        except UsageError as error:
            fail(str(error))
            return False
        messages = [*self._messages, {"role": "user", "content": line}]
        text = self._model.chat_template.render(messages)
        ids = self._encode(text)
        limit = cli_sampling.max_tokens(self._args)
        try:
            with options.checked():
                stream = self._session.generate(
                    ids,
                    limit,
                    params=self._params,
                    stop=self._args.reverse_prompt,
                    stream=True,
                )
        except ContextError:
            fail(
                f"The conversation has {len(ids)} tokens, but the context holds"
                f" {self._session.n_ctx}; /reset begins a new one, -c gives more room."
            )
            return False
        interrupted = _write(stream)
        result = stream.result
        self._messages = [*messages, {"role": "assistant", "content": result.text}]
        self._text, self._ids = text + result.text, ids + result.tokens
        _conclude(result, self._session.stats, self._params.greedy)
        if _is_cut(result, limit):
            warn(
                f"The answer was cut, because the context of {self._session.n_ctx} tokens is full;"
                " /reset begins a new conversation, -c gives more room."
            )
        if interrupted:
            raise KeyboardInterrupt
        return True

    def _encode(self, text: str) -> list[int]:
        """The tokens of the conversation: what was written stays the tokens that were chosen.

        Encoded anew, an answer may fall into other tokens, and the cache of it could not be kept.
        """
        from pykvq.chat import encode_chat

        tokenizer = self._model.tokenizer
        if self._ids and text.startswith(self._text):
            rest = text.removeprefix(self._text)
            added = tokenizer.encode(rest, add_special=False, parse_special=True)
            if added and added[0] in tokenizer.eog_ids:
                return self._ids + added
        return encode_chat(tokenizer, text)
