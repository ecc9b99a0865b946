"""What a real model gives under each cache, where it was fetched (`pykvq pull smollm2`)."""

from __future__ import annotations

from pathlib import Path

from pykvq import Model
from pykvq.perplexity import perplexity

DOCS = Path(__file__).parents[1] / "docs"


def test_each_scheme_stays_as_near_to_f16_as_it_promises(smollm2: Model) -> None:
    """In streaming order, on the documentation's own text; the limits are twice the values."""
    text = "\n".join(path.read_text() for path in sorted(DOCS.glob("*.md")))
    results = perplexity(
        smollm2, text, ["q8_0", "q4_0", "skvq"], n_ctx=1024, chunks=2, kld=True, stream=True
    )
    divergence = {result.kv: result.mean_kld for result in results}
    for kv, limit in {"q8_0": 0.001, "q4_0": 0.08, "skvq": 0.25}.items():
        assert divergence[kv] is not None and divergence[kv] < limit, divergence


def test_skvq_takes_less_than_2_6_bits_at_8192_tokens(smollm2: Model) -> None:
    """Everything included: scales, means, sinks, window, the rows that wait to be sealed."""
    with smollm2.session(kv="skvq", n_ctx=8192) as session:
        stats = session.stats
    per_token = 2 * smollm2.info.n_layers * smollm2.info.n_kv_heads * smollm2.info.d_head
    assert stats.bits_full == 8 * stats.bytes_kv / (8192 * per_token)
    assert 2.0 < stats.bits_full < 2.6
