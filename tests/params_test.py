"""Trees by name: flat and nested, rules that cover every name, merges that explain themselves."""

import jax.numpy as jnp
import numpy as np
import pytest

from raddino_jax import params as trees

TREE = {"backbone": {"blocks_0": {"bias": np.zeros(3)}, "cls": np.zeros((1, 4))}, "step": np.int32(2)}


def test_flatten_names_every_leaf_in_the_order_of_the_tree_and_unflatten_undoes_it():
    flat = trees.flatten(TREE)
    assert list(flat) == ["backbone/blocks_0/bias", "backbone/cls", "step"]
    assert flat["backbone/cls"] is TREE["backbone"]["cls"]
    back = trees.unflatten(flat)
    assert list(back) == ["backbone", "step"] and back["backbone"]["cls"] is flat["backbone/cls"]
    assert trees.flatten(back).keys() == flat.keys()
    assert trees.flatten({}) == trees.unflatten({}) == {}


def test_the_first_rule_that_is_found_in_a_name_gives_its_value():
    rules = [(r"blocks_0/.*bias$", "first"), (r"bias$", None), (r"^backbone/", 0)]
    names = ["backbone/blocks_0/bias", "backbone/blocks_1/bias", "backbone/cls"]
    assert trees.match(rules, names) == dict(zip(names, ("first", None, 0), strict=True))
    assert trees.match(iter(rules), iter(names)) == trees.match(rules, names)


def test_names_that_no_rule_covers_are_listed_with_the_patterns():
    names = [f"head/{i}" for i in range(12)]
    with pytest.raises(ValueError) as error:
        trees.match([(r"^backbone/", 1), (r"/3$", 1)], ["backbone/cls", *names])
    message = str(error.value)
    assert "11 parameters" in message and "head/0, head/1, head/2, head/4" in message
    assert "backbone/cls" not in message and "'^backbone/'" in message and "..." in message


def test_merge_takes_the_values_of_one_tree_in_the_form_and_dtype_of_the_other():
    expected = {"b": {"w": jnp.zeros((2, 3), jnp.bfloat16)}, "a": np.zeros(4, np.float32)}
    given = {"a": np.arange(4.0), "b": {"w": np.ones((2, 3), np.float32)}}
    merged = trees.merge(expected, given, "a file")
    assert list(merged) == ["b", "a"] and merged["b"]["w"].dtype == jnp.bfloat16
    assert merged["a"].dtype == np.float32
    np.testing.assert_array_equal(merged["a"], [0, 1, 2, 3])
    np.testing.assert_array_equal(np.float32(merged["b"]["w"]), 1)


def test_merge_names_what_is_missing_what_is_too_much_and_what_has_another_shape():
    expected = {"a": np.zeros(2), "b": np.zeros((3, 4)), "same": np.zeros(1)}
    given = {"b": np.zeros((4, 3)), "c": np.zeros(5), "same": np.ones(1)}
    with pytest.raises(ValueError) as error:
        trees.merge(expected, given, "weights.safetensors")
    first, *lines = str(error.value).splitlines()
    assert "weights.safetensors" in first
    assert [line.strip() for line in lines] == [
        "missing (1): a",
        "not expected (1): c",
        "of another shape (1): b: expected (3, 4), found (4, 3)",
    ]


def test_an_optional_name_keeps_its_value_but_not_a_wrong_shape():
    expected = {"mask_token": np.full(2, 7.0), "w": np.zeros(3)}
    merged = trees.merge(expected, {"w": np.ones(3)}, "x", optional=["mask_token"])
    np.testing.assert_array_equal(merged["mask_token"], 7)
    np.testing.assert_array_equal(merged["w"], 1)
    with pytest.raises(ValueError, match="another shape"):
        given = {"w": np.ones(3), "mask_token": np.zeros(5)}
        trees.merge(expected, given, "x", optional=["mask_token"])


def test_count_counts_scalars():
    assert trees.count(TREE) == 3 + 4 + 1
