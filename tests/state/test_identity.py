import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.errors import IdentityMismatch
from state.identity import (
    Environment,
    Identity,
    canonical_json,
    differences,
    digest,
    flatten,
    require_same,
    tensor_digest,
    tokens_digest,
    unrecorded,
)

IDENTITY = Identity(
    tensors={"a.weight": "BF16[2,3] xxh3:00", "b.weight": "F32[1] xxh3:01"},
    config=flatten({"hidden_size": 8, "rope_parameters": {"rope_theta": 10000.0}, "layer_types": ["full"]}),
    tokenizer={"tokenizer.json": "xxh3:02"},
    tokens="I32[2,4] xxh3:03",
    statistics=("amax", "tokens"),
)
ENVIRONMENT = Environment(
    torch="2.13", transformers="5.14", modelopt="0.47", device="cpu", experts="eager", dtype="bf16", batch=8,
    threads=2, cpu="AVX2", libraries="oneDNN 3.12",
)  # fmt: skip


def test_digests_are_xxh3_128() -> None:
    assert digest(b"") == "xxh3:99aa06d3014798d86001c324468d497f"
    assert tensor_digest("BF16", (2, 1), b"1234").startswith("BF16[2,1] xxh3:")
    assert tensor_digest("BF16", (), b"12").startswith("BF16[] xxh3:")


def test_tokens_digest_covers_shape_and_values() -> None:
    tokens = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert tokens_digest(tokens).startswith("I32[2,3] xxh3:")
    assert tokens_digest(tokens) == tokens_digest(np.asfortranarray(tokens))
    assert tokens_digest(tokens) != tokens_digest(tokens.reshape(3, 2))
    assert tokens_digest(tokens) != tokens_digest(tokens[::-1])


def test_canonical_json_ignores_order_only() -> None:
    assert canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()
    assert canonical_json([1, 2]) != canonical_json([2, 1])


def test_flatten_names_every_leaf() -> None:
    config = {
        "hidden_size": 8,
        "rope_parameters": {"rope_theta": 1e6, "scaling": None},
        "layer_types": ["full", "sliding"],
        "time_step_limit": [0.0, float("inf")],
        "empty": {},
        "none": [],
        "transformers_version": "5.14.1",
        "_name_or_path": "/models/x",
        "text_config": {"transformers_version": "5.0", "_name_or_path": "", "use": True},
    }
    assert flatten(config) == {
        "empty": "{}",
        "hidden_size": "8",
        "layer_types[0]": '"full"',
        "layer_types[1]": '"sliding"',
        "none": "[]",
        "rope_parameters.rope_theta": "1000000.0",
        "rope_parameters.scaling": "null",
        "text_config.use": "true",
        "time_step_limit[0]": "0.0",
        "time_step_limit[1]": "Infinity",
    }


LEAVES = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(0, 2, width=16) | st.text("ab.[\\", max_size=3)
)
CONFIGS = st.dictionaries(
    st.text("ab.[]\\0", max_size=3),
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.[]\\0", max_size=2), inner),
        max_leaves=5,
    ),
    max_size=4,
)


@given(CONFIGS, CONFIGS)
def test_different_configs_never_flatten_to_the_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert (flatten(a) == flatten(b)) == (canonical_json(a) == canonical_json(b))


def test_nothing_differs_from_itself() -> None:
    assert differences(IDENTITY, copy.deepcopy(IDENTITY)) == []
    assert Identity.model_validate_json(IDENTITY.model_dump_json()) == IDENTITY
    require_same(IDENTITY, IDENTITY, "run", "remedy")


def test_the_order_of_tensors_does_not_matter() -> None:
    other = IDENTITY.model_copy(update={"tensors": dict(reversed(IDENTITY.tensors.items()))})
    assert other.tensors_digest == IDENTITY.tensors_digest
    assert other.digest == IDENTITY.digest
    assert differences(IDENTITY, other) == []


FIELDS = st.sampled_from(
    [f"tensors.{name}" for name in IDENTITY.tensors]
    + [f"config.{name}" for name in IDENTITY.config]
    + ["tokenizer.tokenizer.json", "tokens", "statistics"]
)
KINDS = st.sampled_from(["change", "remove", "add"])


@given(FIELDS, KINDS, st.text("abcdef012", min_size=1, max_size=8))
def test_any_change_is_refused_and_named_with_both_values(field: str, kind: str, text: str) -> None:
    name, _, key = field.partition(".")
    content = IDENTITY.model_dump(mode="json")
    before: str | None
    after: str | None
    if name == "tokens":
        before, content["tokens"] = content["tokens"], "I32[2,4] xxh3:" + text
        after = content["tokens"] if content["tokens"] != before else before
    elif name == "statistics":
        before, content["statistics"], after = "amax, tokens", ["amax", text], f"amax, {text}"
    elif kind == "add":
        key, before, after = f"new-{text}", None, text
        content[name][key] = text
    elif kind == "remove":
        before, after = content[name].pop(key), None
    else:
        before, after = content[name][key], f"new {text}"
        content[name][key] = after
    current = Identity.model_validate(content)

    if before == after:
        assert current.digest == IDENTITY.digest
        return
    found = differences(IDENTITY, current)
    expected = f"{name}.{key}" if key else name
    assert [(one.field, one.stored, one.current) for one in found] == [(expected, before, after)]
    assert current.digest != IDENTITY.digest
    with pytest.raises(IdentityMismatch) as caught:
        require_same(IDENTITY, current, "runs/a was made from other content", "type this")
    assert caught.value.exit_code == 3
    assert caught.value.differences == tuple(found)
    shown = str(caught.value).splitlines()
    assert shown[0] == "runs/a was made from other content; 1 field(s) differ:"
    assert shown[1] == f"  {expected}: stored {before or 'absent'}, now {after or 'absent'}"
    assert shown[2] == "type this"


def test_every_differing_field_is_named() -> None:
    current = IDENTITY.model_copy(
        update={
            "tensors": {"a.weight": "BF16[2,3] xxh3:ff", "c.weight": "F32[1] xxh3:01"},
            "config": IDENTITY.config | {"rope_parameters.rope_theta": "500000.0"},
        }
    )
    assert [str(one) for one in differences(IDENTITY, current)] == [
        "tensors.a.weight: stored BF16[2,3] xxh3:00, now BF16[2,3] xxh3:ff",
        "tensors.b.weight: stored F32[1] xxh3:01, now absent",
        "config.rope_parameters.rope_theta: stored 10000.0, now 500000.0",
        "tensors.c.weight: stored absent, now F32[1] xxh3:01",
    ]


@given(st.sampled_from(sorted(Environment.model_fields)))
def test_any_other_environment_is_named(field: str) -> None:
    value = 99 if field in ("batch", "threads") else "other"
    current = ENVIRONMENT.model_copy(update={field: value})
    assert [(one.field, one.current) for one in differences(ENVIRONMENT, current)] == [(field, str(value))]


def test_a_description_without_the_newer_fields_keeps_its_bytes() -> None:
    """Nothing is written that an older Holdfast would not know, where there is nothing to say."""
    assert "code" not in IDENTITY.model_dump(mode="json")
    assert IDENTITY.digest == "xxh3:b525d37b2ad1d2b46041fa8cbdddeb76"
    coded = IDENTITY.model_copy(update={"code": {"modeling_own.py": "xxh3:05"}})
    assert [str(one) for one in differences(IDENTITY, coded)] == [
        "code.modeling_own.py: stored absent, now xxh3:05"
    ]
    assert Identity.model_validate_json(coded.model_dump_json()) == coded


def test_what_an_older_environment_does_not_say_is_not_compared() -> None:
    older = Environment.model_validate(ENVIRONMENT.model_dump(exclude={"cpu", "libraries"}))
    assert older.model_dump().keys() == ENVIRONMENT.model_dump().keys() - {"cpu", "libraries"}
    assert differences(older, ENVIRONMENT) == []
    assert unrecorded(older, ENVIRONMENT) == ("cpu", "libraries")
    assert unrecorded(ENVIRONMENT, ENVIRONMENT) == ()
    other = older.model_copy(update={"batch": 9})
    assert [one.field for one in differences(other, ENVIRONMENT)] == ["batch"]
