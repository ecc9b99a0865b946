"""Model: opening, metadata, tokens, schemes, lifetimes, and what is refused."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from conftest import N_CTX_TRAIN, write_tiny
from gguf import GGUFReader, GGUFValueType

import pykvq
from pykvq import (
    Model,
    ModelError,
    SchemeError,
    UnsupportedError,
    native,
    schemes,
)
from pykvq._native import lib
from pykvq.checks import SESSION_RANGES
from pykvq.native_session import SessionHandle


def test_info_tells_what_the_file_says(tiny: Model, tiny_path: Path) -> None:
    info = tiny.info
    assert (info.architecture, info.name, info.path) == ("llama", "tiny llama", str(tiny_path))
    assert (info.n_layers, info.n_heads, info.n_kv_heads) == (2, 4, 2)
    assert (info.d_model, info.d_head, info.d_ff) == (64, 64, 96)
    assert (info.n_vocab, info.n_ctx_train) == (269, N_CTX_TRAIN)
    reader = GGUFReader(tiny_path)
    assert info.n_params == sum(int(t.n_elements) for t in reader.tensors)
    assert info.bytes_weights == sum(int(t.n_bytes) for t in reader.tensors)


def test_tensors_are_those_of_the_file(tiny: Model, tiny_path: Path) -> None:
    expected = [
        (t.name, tuple(int(n) for n in t.shape), t.tensor_type.name, int(t.n_bytes))
        for t in GGUFReader(tiny_path).tensors
    ]
    assert [(t.name, t.shape, t.type, t.n_bytes) for t in tiny.tensors] == expected


def test_metadata_equals_what_the_gguf_package_reads(stories_model: Model) -> None:
    fields = {
        key: field
        for key, field in GGUFReader(stories_model.info.path).fields.items()
        if not key.startswith("GGUF.")
    }
    meta = stories_model.metadata
    assert list(meta) == list(fields)
    assert len(meta) == len(fields)
    for key, field in fields.items():
        value = meta[key]
        if field.types[0] != GGUFValueType.ARRAY:
            assert value == field.contents()
            assert type(value) is type(field.contents())
        elif field.types[1] == GGUFValueType.STRING:
            assert value == [field.parts[i].tobytes() for i in field.data]
        else:
            expected = np.concatenate([field.parts[i] for i in field.data])
            assert isinstance(value, np.ndarray)
            assert value.dtype == expected.dtype
            np.testing.assert_array_equal(value, expected)


def test_metadata_is_a_mapping_of_its_own_copies(tiny: Model) -> None:
    assert "general.name" in tiny.metadata
    assert tiny.metadata.get("no.such.key") is None
    with pytest.raises(KeyError, match="such"):
        tiny.metadata["no.such.key"]
    kinds = tiny.metadata["tokenizer.ggml.token_type"]
    assert isinstance(kinds, np.ndarray)
    kinds[:] = 99
    np.testing.assert_array_equal(
        np.unique(np.asarray(tiny.metadata["tokenizer.ggml.token_type"])), [1, 3]
    )


def test_text_survives_tokenize_and_detokenize(tiny: Model) -> None:
    text = "the and \u00e9\u4e16 <|im_end|>"
    ids = tiny.tokenize(text)
    assert tiny.detokenize(ids) == text
    end = tiny.tokenizer.eos
    assert end not in ids
    assert tiny.tokenize(text, parse_special=True)[-1] == end


def test_tokenizer_and_template_are_built_once(tiny: Model) -> None:
    assert tiny.tokenizer is tiny.tokenizer
    assert tiny.chat_template is tiny.chat_template
    assert tiny.has_chat_template
    rendered = tiny.chat_template.render([{"role": "user", "content": "Hi"}])
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_model_without_template_falls_back_with_a_warning(tiny_qwen2: Model) -> None:
    assert not tiny_qwen2.has_chat_template
    with pytest.warns(UserWarning, match="no chat template"):
        tiny_qwen2.chat_template  # noqa: B018


# ---- sampling defaults ----------------------------------------------------------------------


def test_recommended_sampling_becomes_the_default(tmp_path: Path) -> None:
    extra: dict[str, object] = {
        "general.sampling.temp": 0.25,
        "general.sampling.top_k": 7,
        "general.sampling.penalty_repeat": 1.5,
        "general.sampling.sequence": "top_k;temperature",
    }
    with Model(write_tiny(tmp_path / "m.gguf", extra=extra)) as model:
        params = model.sampling_defaults
    assert (params.temp, params.top_k, params.repeat_penalty) == (0.25, 7, 1.5)
    assert params.samplers == ("top_k", "temperature")
    assert params.top_p == pykvq.SamplingParams().top_p


def test_recommendation_that_is_not_understood_is_named(tmp_path: Path) -> None:
    extra: dict[str, object] = {"general.sampling.top_p": 3.0, "general.sampling.mirostat": 2}
    path = write_tiny(tmp_path / "m.gguf", extra=extra)
    with Model(path) as model, pytest.warns(UserWarning) as caught:
        assert model.sampling_defaults == pykvq.SamplingParams()
    text = " ".join(str(warning.message) for warning in caught)
    named = re.findall(r"general\.sampling\.\w+", text)
    assert sorted(named) == ["general.sampling.mirostat", "general.sampling.top_p"]


# ---- schemes --------------------------------------------------------------------------------


def test_schemes_tell_what_a_session_then_has(tiny: Model, tiny_path: Path) -> None:
    for scheme in tiny.schemes:
        # What has two forms is described in the one without a profile.
        profile: Literal[False] | None = False if scheme.profile == "optional" else None
        with (
            Model(tiny_path, profile=profile) as model,
            model.session(kv=scheme.name, n_ctx=512) as session,
        ):
            stats = session.stats
        assert (stats.scheme, stats.sinks, stats.window) == (
            scheme.name,
            scheme.sinks,
            scheme.window,
        )
        if scheme.name == "auto":  # shares one budget out between the two
            budget = (scheme.bits_k + scheme.bits_v) / 2
            assert 0.98 * budget < stats.bits_sealed <= budget
            continue
        if scheme.name in (
            "svdq",
            "svdq-1.25",
        ):  # a scale for each channel that has bits, at most all
            assert scheme.bits_k - 0.125 <= stats.bits_sealed_k <= scheme.bits_k
        else:
            assert stats.bits_sealed_k == pytest.approx(scheme.bits_k)
        assert stats.bits_sealed_v == pytest.approx(scheme.bits_v)
    names = [scheme.name for scheme in schemes()]
    assert {"f16", "q8_0", "q4_0", "skvq"} <= set(names)


def test_scheme_without_a_form_for_the_head_width_is_left_out(tiny_qwen2: Model) -> None:
    names = [scheme.name for scheme in tiny_qwen2.schemes]
    assert "f16" in names
    assert "q4_0" not in names  # packs 32 channels, and the heads have 16
    with pytest.raises(UnsupportedError, match="16 wide"):
        tiny_qwen2.session(kv="q4_0")


def test_asymkv_has_more_bits_in_as_many_layers_as_it_is_told(tiny: Model) -> None:
    def bits(layers: tuple[int, int] | None) -> tuple[float, float]:
        with tiny.session(kv="asymkv", n_ctx=512, asymkv_layers=layers) as session:
            return session.stats.bits_sealed_k, session.stats.bits_sealed_v

    n = tiny.info.n_layers
    (least_k, least_v), (most_k, most_v) = bits((0, 0)), bits((n, n))
    assert most_k - least_k == pytest.approx(1)
    assert most_v - least_v == pytest.approx(1)
    assert bits((1, 0)) == pytest.approx((least_k + 1 / n, least_v))
    assert bits(None) == pytest.approx((most_k, least_v + (n + 1) // 2 / n))
    with pytest.raises(ValueError, match=f"expected 0 to {n}, the number of layers"):
        bits((n + 1, 0))
    with pytest.raises(ValueError, match=r"l_v is -1, expected a whole number from 0"):
        bits((0, -1))
    with pytest.raises(ValueError, match="the KV scheme skvq, but only asymkv"):
        tiny.session(kv="skvq", asymkv_layers=(1, 1))


def test_asymkv_spends_an_average_of_bits_by_the_profile(tiny: Model, tiny_path: Path) -> None:
    with tiny.session(kv="asymkv", n_ctx=512, kv_bits=1.9) as session:
        assert 1.6 < session.stats.bits_sealed <= 1.9
    with (
        Model(tiny_path, profile=False) as model,
        pytest.raises(ValueError, match=r"profiles were switched off \(--profile none"),
    ):
        model.session(kv="asymkv", kv_bits=1.9)


def test_only_f16_is_lossless() -> None:
    assert [scheme.name for scheme in schemes() if scheme.lossless] == ["f16"]


# ---- refusals -------------------------------------------------------------------------------


def test_unknown_scheme_is_refused_before_the_model_is_looked_for(tiny: Model) -> None:
    for attempt in (
        lambda: Model("no-such-model", kv="q3"),
        lambda: tiny.session(kv="q3"),
    ):
        with pytest.raises(SchemeError, match=r"'q3' is unknown; known are: f16, .*skvq"):
            attempt()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.gguf is not there"):
        Model(tmp_path / "absent.gguf")


def test_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "junk.gguf"
    path.write_bytes(b"This is not a model, it only looks like a file." * 10)
    with pytest.raises(ModelError, match=r"junk\.gguf"):
        Model(path)


def test_cut_file_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    data = tiny_path.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in (0, 3, 100, len(data) // 2, len(data) - 1000):
        path.write_bytes(data[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            Model(path)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", n_tensors_left_out=1)
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_down\.weight"):
        Model(path)


def test_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "qwen9")
    with pytest.raises(UnsupportedError, match="qwen9"):
        Model(path)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n_ctx", 0),
        ("n_ctx", -5),
        ("n_ctx", 2**40),
        ("n_batch", 0),
        ("n_threads", 0),
        ("n_threads", 100_000),
        ("kv_window", -1),
        ("kv_sinks", 10_000),
    ],
)
def test_number_out_of_range_is_named(tiny: Model, option: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{option.removeprefix('kv_')} is {value}"):
        tiny.session(**{option: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"{option} is {value}, expected a whole number from"):
        Model(tiny.info.path, **{option: value})  # type: ignore[arg-type]


def test_any_integer_type_is_a_number(tiny_path: Path) -> None:
    numbers = {"n_ctx": np.int64(64), "n_threads": np.uint8(1), "kv_sinks": np.int32(3)}
    with Model(tiny_path, **numbers) as model, model.session() as session:  # type: ignore[arg-type]
        assert (session.n_ctx, session.stats.sinks) == (64, 3)
    for wrong in (64.0, "64", True):
        with pytest.raises(ValueError, match=f"n_ctx is {wrong!r}, expected a whole number"):
            Model(tiny_path, n_ctx=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("kv", 3, "The KV scheme is 3, expected a name"),
        ("kv", ["skvq"], r"The KV scheme is \['skvq'\], expected a name"),
        ("device", 0, "device is 0, expected auto, cpu, cuda or cuda:N"),
        ("device", "cpu\0x", r"device is 'cpu\\x00x', expected auto"),
        ("device", "\udcff", r"device is '\\udcff', expected auto"),
        ("kv_bits", "2", "kv_bits is '2', expected a number from 0.1 to 16"),
        ("kv_bits", True, "kv_bits is True, expected a number"),
    ],
)
def test_option_of_another_type_is_named(
    tiny_path: Path, tiny: Model, option: str, value: Any, expected: str
) -> None:
    for use in (tiny.session, tiny.plan, lambda **o: Model(tiny_path, **o)):
        with pytest.raises(ValueError, match=expected):
            use(**{option: value})
    with pytest.raises(SchemeError, match="The KV scheme is None, expected a name"):
        Model(tiny_path, kv=None)  # type: ignore[arg-type]


def test_layers_on_a_gpu_are_refused_where_the_device_is_the_cpu(tiny_path: Path) -> None:
    with Model(tiny_path, device="cuda", n_gpu_layers=2) as model:
        for use in (model.session, model.plan):
            with pytest.raises(ValueError, match="n_gpu_layers is 3, but the device is cpu"):
                use(device="cpu", n_gpu_layers=3)
            use(device="cpu", n_gpu_layers=0)
            use(device="cpu")  # the layers that the model was opened with were for its own device


def test_the_ranges_of_numbers_are_those_of_the_core(tiny: Model) -> None:
    names = {"kv_sinks": "sinks", "kv_window": "window"}
    for option, (least, most) in SESSION_RANGES.items():
        name = names.get(option, option)
        numbers = {"n_ctx": 64, "n_batch": 1, "n_threads": 1, "sinks": 0, "window": 0}
        numbers[name] = most + 1
        with pytest.raises(ValueError, match=rf"{name} is {most + 1}, expected {least} to {most}"):
            SessionHandle(tiny._handle, scheme="f16", **numbers)


def test_context_beyond_the_memory_is_refused(tiny: Model) -> None:
    with pytest.raises(pykvq.MemoryLimitError, match="smaller n_ctx"):
        tiny.session(kv="f16", n_ctx=2**28)


# ---- lifetime -------------------------------------------------------------------------------


def test_closing_a_model_closes_its_sessions(tiny_path: Path) -> None:
    model = Model(tiny_path)
    session = model.session()
    session.eval([1, 2, 3])
    metadata = model.metadata
    model.close()
    model.close()
    assert model.closed
    assert session.closed
    for attempt in (
        lambda: session.eval([1]),
        lambda: session.truncate(0),
        lambda: session.generate([1, 2]),
        lambda: session.until_seal,
        model.session,
        lambda: metadata["general.name"],
        lambda: model.tensors,
    ):
        with pytest.raises(ValueError, match="was closed"):
            attempt()
    session.cancel()
    session.close()
    assert model.info.n_vocab == 269
    with pytest.raises(ValueError, match="was closed"), model:
        pass
    with pytest.raises(ValueError, match="was closed"), session:
        pass


def test_a_text_of_another_type_is_refused(tiny: Model) -> None:
    for wrong in (None, b"hi", 3):
        with pytest.raises(TypeError, match=f"of type {type(wrong).__name__}, expected a str"):
            tiny.tokenize(wrong)  # type: ignore[arg-type]


def test_session_keeps_its_model_alive(tiny_path: Path) -> None:
    session = Model(tiny_path).session()
    gc.collect()
    assert session.eval([1, 2]).shape == (1, 269)
    assert session.model.info.name == "tiny llama"


def test_forgotten_models_and_sessions_are_freed_in_any_order(tiny_path: Path) -> None:
    for _ in range(20):
        model = Model(tiny_path)
        session = model.session(n_ctx=64)
        session.eval([1])
        session.knot = [model, session]  # type: ignore[attr-defined]  # a cycle
        del model, session
    gc.collect()


def test_closing_waits_for_a_session_at_work(tiny_path: Path) -> None:
    model = Model(tiny_path, n_ctx=8192)
    session = model.session(kv="f16")
    errors: list[BaseException] = []
    started = threading.Event()

    def work() -> None:
        try:
            session.eval([1] * 8000, progress=lambda *_: started.set())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(30)
    model.close()
    thread.join(30)
    assert not thread.is_alive()
    assert len(errors) == 1
    assert isinstance(errors[0], (pykvq.Cancelled, ValueError))


# ---- the package ----------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, pykvq; heavy = {'numpy', 'jinja2', 'tokenizers', 'rich', 'huggingface_hub',"
        " 'pykvq._native'}; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_had() -> None:
    for name in pykvq.__all__:
        assert getattr(pykvq, name) is not None
    assert sorted(pykvq.__all__) == dir(pykvq)
    with pytest.raises(AttributeError, match="no_such_name"):
        pykvq.no_such_name  # noqa: B018
    assert re.fullmatch(r"\d+\.\d+\.\d+", pykvq.__version__)


def test_stub_names_what_the_native_module_has() -> None:
    stub = (Path(pykvq.__file__).parent / "_native.pyi").read_text()
    functions = set(re.findall(r"def (kvq_\w+)\(", stub))
    constants = set(re.findall(r"^    (KVQ_\w+): int", stub, re.MULTILINE))
    found = {name for name in dir(lib) if not name.startswith("_")}
    assert functions == {name for name in found if name.startswith("kvq_")}
    assert constants <= found


def test_selected_instruction_set_is_available() -> None:
    assert native.isa_selected() in native.isa_available()
    assert "ref" in native.isa_available()


@pytest.mark.parametrize(("name", "code"), [("ref", 0), ("sse9", 2)])
def test_kvq_isa_selects_an_instruction_set(name: str, code: int) -> None:
    import os

    done = subprocess.run(
        [sys.executable, "-m", "pykvq", "info", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "KVQ_ISA": name},
        cwd=Path(pykvq.__file__).parents[1],
    )
    assert done.returncode == code
    if code == 0:
        assert '"isa": "ref"' in done.stdout
    else:
        assert "sse9" in done.stderr
        assert "Traceback" not in done.stderr
