"""A jinja2 sandbox for templates that come with files from strangers.

jinja2's own sandbox keeps a template away from Python's internals (a template once was enough to
run any code: CVE-2024-34359) but lets it run and grow without end. This one adds limits: time is
checked in every loop, call and filter, and the size of every value at the moment when it is made.
What can neither loop nor grow beyond its inputs needs no check; what can, and is of no use to a
chat template, such as the filter `center`, is not offered.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, nodes, pass_context, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, do_format, do_indent, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 5.0
"""How long one rendering may take."""

MAX_SIZE = 1 << 23
"""How big a value or the rendered text may get: in characters, and in items of containers."""

MAX_SOURCE = 1 << 20
"""How long a template may be, in characters."""

_MAX_INT_BITS = 1 << 10

_deadline: ContextVar[float] = ContextVar("deadline")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# jinja2's filters whose result is about as big as their input; others are guarded below.
_PLAIN_FILTERS = _words(
    "abs attr capitalize count d default dictsort e escape first float forceescape groupby int "
    "items last length list lower max min reverse safe sort string sum title trim truncate unique "
    "upper urlencode wordcount"
)
_SELECTING_FILTERS = _words("reject rejectattr select selectattr")

# The methods of built-in types that a template may call.
_METHODS = {
    str: _words(
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit "
        "islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix "
        "removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith "
        "strip swapcase title upper"
    ),
    bytes: _words(""),
    dict: _words("get items keys values"),
    list: _words("count index"),
    tuple: _words("count index"),
    range: _words("count index"),
    int: _words("imag real"),
    float: _words("imag is_integer real"),
}


# Fields of formats whose width could be used to make endless text.
_WIDE_FIELDS = {
    "%": re.compile(r"%(\([^)]*\))?[#0 +-]*(\d*\.)?(\*|\d{4})"),
    "{": re.compile(r"\{[^{}]*:[^{}]*(\d{4}|\{)"),
}


class LimitError(TemplateError):
    """A template took too long, or made something too big."""


class RefusalError(TemplateError):
    """A template called `raise_exception`."""


def _tick() -> None:
    """Ends the rendering if its time is over."""
    if time.monotonic() > _deadline.get():
        raise LimitError(f"it takes longer than {MAX_SECONDS:g} seconds")


def _too_big() -> NoReturn:
    raise LimitError(f"it makes a value of more than {MAX_SIZE} characters or items")


def _allow(size: int) -> None:
    if size > MAX_SIZE:
        _too_big()


def _size(value: Any) -> int:
    """The size of a value when written out.

    What a container holds is counted as often as it occurs: a list that holds another one twice,
    and so on 40 times, is small in memory but endless in print.
    """
    _tick()
    size = 0
    stack = [value]
    while stack:
        item = stack.pop()
        size += 1
        if isinstance(item, (str, bytes)):
            size += len(item)
        elif isinstance(item, int):
            if item.bit_length() > _MAX_INT_BITS:
                raise LimitError(f"it makes an integer of more than {_MAX_INT_BITS} bits")
        elif isinstance(item, dict):
            stack += item.keys()
            stack += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack += item
        _allow(size + len(stack))
        if size % 4096 == 0:
            _tick()
    return size


def _weighed(value: Any) -> Any:
    """The value itself, once it is known to be small enough."""
    _size(value)
    return value


def _ticking(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _tick()
        yield item


def _joined(parts: Iterable[str]) -> str:
    """Joins strings, checking the size of the result before it exists."""
    pieces = []
    size = 0
    for part in _ticking(parts):
        pieces.append(part)
        size += len(part)
        _allow(size)
    return "".join(pieces)


def _interleaved(items: Iterable[Any], separator: str) -> Iterator[str]:
    for i, item in enumerate(items):
        if i:
            yield separator
        yield str(item)


def _concat(parts: Iterable[Any]) -> str:
    return _joined(map(str, parts))


@pass_environment
def _join(environment: Environment, value: Any, d: Any = "", attribute: Any = None) -> str:
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return _joined(_interleaved(items, str(d)))


@pass_context
def _map(context: Context, value: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    size = 0
    for item in FILTERS["map"](context, value, *args, **kwargs):
        size += _size(item)
        _allow(size)
        yield item


def _selecting(name: str) -> Callable[..., Any]:
    """A filter of jinja2 that tests every item, made to look at the time before each."""

    @pass_context
    def select(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        return FILTERS[name](context, _ticking(value) if value else (), *args, **kwargs)

    return select


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(value), str(old), str(new)
    _allow(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _check_format(text: str, mark: str, values: Any) -> None:
    """Refuses a format whose result would be too big.

    Args:
        text: the format.
        mark: what begins a field: "%" for the operator, "{" for `str.format`.
        values: what is to be written.
    """
    if _WIDE_FIELDS[mark].search(text):
        raise LimitError("it writes a value to a width that is computed or of four digits or more")
    _allow(text.count(mark) * (999 + _size(values)))


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    _check_format(str(value), "%", [args, kwargs])
    return do_format(value, *args, **kwargs)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = str(value)
    _allow(
        len(text) + (len(text.splitlines()) + 1) * (width if isinstance(width, int) else len(width))
    )
    return do_indent(text, width, first, blank)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON as in transformers, not escaped for HTML as jinja2's own filter does."""
    if indent is not None:
        _allow(indent)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return _joined(encoder.iterencode(value))


def _strftime_now(format: str) -> str:
    """The local time in a format of `strftime`."""
    _allow(len(format) * 256)
    return datetime.now().strftime(format)


def _raise_exception(message: object) -> NoReturn:
    raise RefusalError(str(message))


def _check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuses an operation whose result would be too big."""
    if operator == "%" and isinstance(left, (str, bytes)):
        _check_format(str(left), "%", right)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _size(1 << min(max(left.bit_length() * right, 0), 2 * _MAX_INT_BITS))
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, bytes, list, tuple)) and isinstance(times, int):
                _allow(len(value) * times)


class _Meter(NodeTransformer):
    """Puts a check where a parsed template loops or makes a value."""

    def _check(self, name: str, node: nodes.Node) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._check("kvq_ticking", node.iter)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        return self._check("kvq_weighed", node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._check("kvq_concat", nodes.List(node.nodes, lineno=node.lineno))

    def _visit_literal(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":
            return node  # the target of an assignment
        if all(isinstance(child, nodes.Const) for child in node.iter_child_nodes()):
            return node
        return self._check("kvq_weighed", node)

    visit_List = visit_Tuple = visit_Dict = _visit_literal


class _GenerationTag(Extension):
    """`{% generation %}`, by which transformers marks the model's words; only its body counts."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """A sandbox with limits on time and size; see the module's head."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(_joined)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _GenerationTag],
            optimized=False,  # a constant that is folded would escape the checks
        )
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.filters = {name: FILTERS[name] for name in _PLAIN_FILTERS}
        self.filters.update({name: _selecting(name) for name in _SELECTING_FILTERS})
        self.filters.update(
            format=_format, indent=_indent, join=_join, map=_map, replace=_replace, tojson=_tojson
        )
        self.filters.update(kvq_concat=_concat, kvq_ticking=_ticking, kvq_weighed=_weighed)

    def compile_template(self, source: str) -> Template:
        """Compiles a template with its checks.

        Raises:
            TemplateError: the template is too long or not valid.
        """
        if len(source) > MAX_SOURCE:
            raise LimitError(f"it has {len(source)} characters, more than {MAX_SOURCE}")
        tree = _Meter().visit(self.parse(source))
        tree.set_environment(self)
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def render(self, template: Template, variables: dict[str, Any]) -> str:
        """Renders a template within the limits; may raise any exception."""
        token = _deadline.set(time.monotonic() + MAX_SECONDS)
        try:
            return template.render(variables)
        finally:
            _deadline.reset(token)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read an attribute: of built-in types only a few methods."""
        if not super().is_safe_attribute(obj, attr, value):
            return False
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return True

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Refuses an attribute at once, where jinja2 waits until it is used."""
        raise SecurityError(f"it reads {attribute!r} of a {type(obj).__name__}, which is not safe")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The safe form of a `str.format` method, or None for any other value."""
        write = super().wrap_str_format(value)
        if write is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, "{", [args, kwargs])
            return write(*args, **kwargs)

        return checked

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function for a template.

        The parameters have two underscores so that no keyword of the template can mean them.
        """
        _tick()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "replace" and len(args) > 1:
            old, new = map(str, args[:2])
            _allow(len(owner) + owner.count(old) * len(new))
        elif isinstance(owner, str) and name == "join" and args:
            args = (list(args[0]),)
            _joined(_interleaved(args[0], owner))
        return _weighed(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Applies one of the operators that can make a value grow."""
        _check_operation(operator, left, right)
        return _weighed(super().call_binop(context, operator, left, right))
