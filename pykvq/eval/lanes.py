"""The KV schemes that an evaluation compares: those of the core and the simulated ones.

Owns how a name becomes a session, and what the scheme costs in bits. Knows no task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pykvq import native
from pykvq.closing import Closing
from pykvq.errors import KvqError, SchemeError
from pykvq.eval.simulations import SIMULATIONS
from pykvq.kv_names import parse_kv
from pykvq.perplexity import REFERENCE

if TYPE_CHECKING:
    from pykvq.eval.simulations import Simulation
    from pykvq.model import Model, ModelInfo
    from pykvq.moments import Moments
    from pykvq.session import Session


@dataclass(frozen=True)
class Lane:
    """A scheme as it takes part.

    Attributes:
        name: What it was asked for as: the name of a scheme; of one of the core that has a budget
            of bits also "NAME:BITS".
        scheme: The scheme of the core that its session has.
        bits: The budget, if one was given.
        profile: Whether the scheme uses the model's profile.
        summary: What it is, in one line.
        source: Where it is from: a paper, or "pykvq" for schemes that run.
        simulation: What stands in for its codec, if the core does not have it.
        sinks: First tokens kept in f16.
        window: Last tokens kept in f16.
    """

    name: str
    scheme: str
    bits: float | None
    profile: bool
    summary: str
    source: str
    simulation: Simulation | None
    sinks: int
    window: int

    @property
    def needs_moments(self) -> bool:
        """Whether it has to be calibrated on a text first."""
        return self.simulation is not None and self.simulation.needs_moments


def usable_names(model: Model, left_out: Callable[[str], None]) -> list[str]:
    """The names of all schemes that a model can have.

    Args:
        model: The model.
        left_out: Told of each other scheme, in a sentence that names it and says why.
    """
    names = []
    for lane in find_lanes(known_names(), 0, 0):
        try:
            cost(lane, model, 1)
        except (KvqError, ValueError) as error:
            left_out(f"{lane.name} is left out. {error}")
        else:
            names.append(lane.name)
    return names


def known_names() -> list[str]:
    """The names of all schemes that can take part: those of the core, then the simulated ones."""
    running = [scheme.name for scheme in native.schemes()]
    return running + [name for name in SIMULATIONS if name not in running]


def find_lanes(
    names: Sequence[str], sinks: int, window: int, *, own_setting: bool = False
) -> list[Lane]:
    """The lanes of schemes, each once; the reference comes first, whether named or not.

    Args:
        names: Names of schemes; "auto:1.5" is auto with a budget of 1.5 bits.
        sinks: First tokens that all of them keep in f16.
        window: Last tokens that all of them keep in f16.
        own_setting: Whether each scheme keeps its own sinks and window instead. The reference,
            which loses nothing, takes the common ones: where it would seal, all lanes stop.

    Raises:
        SchemeError: A name is not known.
    """
    running = {scheme.name for scheme in native.schemes()}
    lanes = []
    for name in dict.fromkeys([REFERENCE, *names]):
        if name in SIMULATIONS:
            s = SIMULATIONS[name]
            lane = Lane(name, REFERENCE, None, False, s.summary, s.source, s, s.sinks, s.window)
        elif name.partition(":")[0] in running:
            t, bits = parse_kv(name)
            used = t.profile != "none"
            lane = Lane(name, t.name, bits, used, t.summary, "pykvq", None, t.sinks, t.window)
        else:
            raise SchemeError(native.unknown_scheme(name, known_names()))
        if name == REFERENCE or not own_setting:
            lane = replace(lane, sinks=sinks, window=window)
        lanes.append(lane)
    return lanes


# ---- what a scheme costs --------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a scheme stores on a model.

    Attributes:
        bits_k: Bits per element of sealed keys, with all metadata of their blocks.
        bits_v: The same for values.
        bytes_tables: Permutations and bases that it needs, once per model.
        bytes_total: What a session of `n_ctx` tokens allocates for its cache, and these tables.
        bits_full: The same by the element, of a cache that is full.
    """

    bits_k: float
    bits_v: float
    bytes_tables: int
    bytes_total: int
    bits_full: float

    @property
    def bits_sealed(self) -> float:
        """Bits per element of a sealed block, keys and values averaged."""
        return (self.bits_k + self.bits_v) / 2


def elements_per_token(info: ModelInfo) -> int:
    """Numbers that a token adds to the cache of a model: its keys and its values."""
    return 2 * info.n_layers * info.n_kv_heads * info.d_head


def cost(lane: Lane, model: Model, n_ctx: int) -> Cost:
    """What a lane's scheme stores on a model, as the core plans a session of `n_ctx` tokens.

    Of a simulated scheme that is the f16 session that stands for it, with sealed blocks of as many
    bits as the scheme has, and its tables.

    Raises:
        UnsupportedError: The scheme has no form for this model.
        ValueError: It needs a profile and there is none, or `n_ctx` is out of range.
    """
    s = model.plan(
        kv=lane.scheme,
        kv_bits=lane.bits,
        kv_sinks=lane.sinks,
        kv_window=lane.window,
        n_ctx=n_ctx,
    ).stats
    if lane.simulation is None:
        total = s.bytes_kv + s.bytes_tables
        return Cost(s.bits_sealed_k, s.bits_sealed_v, s.bytes_tables, total, s.bits_full)
    bits_k, bits_v = lane.simulation.bits(model.info)
    tables = lane.simulation.table_bytes(model.info)
    keys = s.bytes_sealed_k * bits_k / s.bits_sealed_k
    values = s.bytes_sealed_v * bits_v / s.bits_sealed_v
    total = round(s.bytes_sinks + s.bytes_recent + keys + values) + tables
    bits_full = 8 * total / (n_ctx * elements_per_token(model.info))
    return Cost(bits_k, bits_v, tables, total, bits_full)


def digest(lane: Lane, model: Model) -> str:
    """What tells whether results of a lane still hold: as long as it is the same, they do.

    Of a scheme of the core it is made from what sealed blocks read back as, bits and profile
    included; of a simulation from its parameters. To both, sinks and window are added.
    """
    if lane.simulation is not None:
        nameless = replace(lane.simulation, name="", summary="", source="", sinks=0, window=0)
        sealing = repr(nameless)
    else:
        with model.session(kv=lane.scheme, kv_bits=lane.bits, n_ctx=1, n_batch=1) as session:
            sealing = f"{session.digest():016x}"
    decides = f"{sealing}, {lane.sinks} + {lane.window}"
    return hashlib.sha256(decides.encode()).hexdigest()[:16]


# ---- sessions -------------------------------------------------------------------------------


class SessionPool(Closing):
    """A session for each lane, opened when it is first asked for."""

    def __init__(
        self,
        model: Model,
        moments: Callable[[], Moments],
        *,
        n_ctx: int,
        n_batch: int | None = None,
        n_threads: int | None = None,
    ) -> None:
        """Opens nothing yet.

        Args:
            model: The model.
            moments: Gives its moments; called only if a scheme needs them.
            n_ctx: Tokens that each session holds.
            n_batch: Tokens per pass.
            n_threads: Threads.
        """
        self.model = model
        self._moments = moments
        self._options: dict[str, Any] = {
            "n_ctx": n_ctx,
            "n_batch": n_batch,
            "n_threads": n_threads,
            "device": "cpu",  # which simulations need, and all lanes are to be alike
        }
        self._sessions: dict[str, Session] = {}
        self._stack = ExitStack()

    def session(self, lane: Lane) -> Session:
        """The lane's session, which may hold tokens of an earlier use."""
        if lane.name not in self._sessions:
            self._sessions[lane.name] = self._open(lane)
        return self._sessions[lane.name]

    def _open(self, lane: Lane) -> Session:
        simulation = lane.simulation
        session = self._stack.enter_context(
            self.model.session(
                kv=lane.scheme,
                kv_bits=lane.bits,
                kv_sinks=lane.sinks,
                kv_window=lane.window,
                **self._options,
            )
        )
        if simulation is not None:
            moments = self._moments() if simulation.needs_moments else None
            session.simulate(simulation.open(self.model, moments))
        return session

    def close(self) -> None:
        """Closes the sessions."""
        self._stack.close()
        self._sessions.clear()
