# SPDX-License-Identifier: Apache-2.0
"""Patterns of PEFT configurations: they choose ranks and scalings as PEFT does, and none keeps Python busy for ever."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from loracache.adapters.peft import CONFIG, WEIGHTS, PeftFolder, Settings, unusable_settings
from loracache.errors import UsageError

Q = "model.layers.0.self_attn.q_proj"


def write(folder: Path, config: dict[str, Any], ranks: dict[str, int]) -> Path:
    """ranks: of every module."""
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = {}
    for module, rank in ranks.items():
        tensors[f"{module}.lora_A.weight"] = np.zeros((rank, 2), dtype=np.float16)
        tensors[f"{module}.lora_B.weight"] = np.zeros((2, rank), dtype=np.float16)
    save_file(tensors, folder / WEIGHTS)
    return folder


def check(folder: Path) -> Settings:
    with PeftFolder(folder) as opened:
        return opened.check()


@pytest.mark.parametrize(
    ("pattern", "matched", "others"),
    [
        ("q_proj", ["q_proj", Q, "a.q_proj"], ["xq_proj", "q_proj.x", "q_proj_x", "x.q-proj"]),
        ("layers.1.q_proj", ["m.layers.1.q_proj", "layersx1.q_proj"], ["m.layers.11.q_proj", "xlayers.1.q_proj"]),
        (r"layers\.1\.q_proj", ["model.layers.1.q_proj"], ["model.layersx1.q_proj"]),
        ("^model.q_proj", ["model.q_proj"], ["x.model.q_proj", "q_proj"]),
        ("[qv]_proj$", ["m.q_proj", "m.v_proj"], ["m.k_proj"]),
        ("q_proj|v_proj", ["m.q_proj", "m.v_proj"], ["m.xv_proj", "m.k_proj"]),
        (r".*\.1\..*", ["m.1.q", "1.m.1.q"], ["1.q", "m.1", "m.11.q"]),
        (r"layers\.(0|1)\.\w+", ["m.layers.0.q", "layers.1.v"], ["m.layers.2.q"]),
        (r"\d+", ["m.17"], ["m.x17"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_pattern_matches_a_suffix_at_a_dot(pattern: str, matched: list[str], others: list[str]) -> None:
    found = Settings(8, 16, rank_pattern={pattern: 2}, alpha_pattern={pattern: 3.5})
    assert not unusable_settings({"rank_pattern": {pattern: 2}, "alpha_pattern": {pattern: 3.5}})
    assert [(found.rank_of(module), found.scaling_of(module, 2)) for module in matched] == [(2, 1.75)] * len(matched)
    assert [(found.rank_of(module), found.scaling_of(module, 8)) for module in others] == [(8, 2.0)] * len(others)


@pytest.mark.parametrize("turn", [1, -1])
def test_the_first_pattern_in_the_file_wins(tmp_path: Path, turn: int) -> None:
    patterns = [("q_proj", 4), ("0.self_attn.q_proj", 2), ("a", 1)][::turn]
    first = 4 if turn == 1 else 2
    config = {"lora_alpha": 8, "rank_pattern": dict(patterns), "alpha_pattern": dict(patterns)}
    found = check(write(tmp_path, config, {Q: first}))
    assert (found.rank_of(Q), found.scaling_of(Q, 1)) == (first, first)


def peft_chooses(patterns: dict[str, int], module: str, default: int) -> int:
    """What its documentation says: the first pattern that is all of a suffix, which begins where the name or a part of
    it begins. `pos` leaves "^" to the beginning of the name."""
    starts = [0, *(dot.end() for dot in re.finditer(r"\.", module))]
    for pattern, value in patterns.items():
        if any(re.compile(pattern).fullmatch(module, start) for start in starts):
            return value
    return default


PIECES = st.sampled_from(
    ["q", "v", ".", r"\.", ".*", "0", r"\d+", "[qv]", "[^q.]", "q|v", "^", "$", r"\b", r"\B", "(q|v0)", "(?:0|00)?",
     "()", "(", ")", "*", "+?", "{2}", "{,2}", "{1,}", "?", "(?!q)", "(?=.*0)", "(?!", "(?="]
)  # fmt: skip
MODULES = st.lists(st.sampled_from(["q", "v", "qv", "0", "00"]), min_size=1, max_size=4).map(".".join)


@given(st.lists(st.lists(PIECES, min_size=1, max_size=5).map("".join), max_size=4, unique=True), MODULES)
def test_patterns_choose_as_peft_does(patterns: list[str], module: str) -> None:
    ranks = {pattern: at + 1 for at, pattern in enumerate(patterns)}
    if not unusable_settings({"rank_pattern": ranks}):
        assert Settings(100, 1, rank_pattern=ranks).rank_of(module) == peft_chooses(ranks, module, 100)


# What PEFT itself matches with no harm done.
HARMLESS = [
    (r"(model\.)?layers\.0\.self_attn\.q_proj", [Q, "x.layers.0.self_attn.q_proj"], ["layers.1.self_attn.q_proj"]),
    (r"model.layers.(?:0|1).self_attn.q_proj", [Q], [Q.replace("0", "2")]),
    (r"layers\.\d{1,2}\.self_attn\.q_proj", [Q, Q.replace("0", "17")], [Q.replace("0", "117")]),
    (".*self_attn.*q.*proj", [Q], ["model.layers.0.self_attn.k_proj"]),
    (r"layers\.([0-9]|1[0-9])\..*\b(q|v)_proj\b", [Q, Q.replace("0", "19")], [Q.replace("0", "20")]),
    (r"(?P<kind>q|k)_proj", [Q, "k_proj"], ["v_proj"]),
    (r"l(ayers)+?\.0\..*?q_proj", [Q], ["model.l.0.q_proj"]),
    ("", ["model."], [Q]),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "matched", "others"), HARMLESS, ids=[each[0] for each in HARMLESS])
def test_a_harmless_pattern_is_served(pattern: str, matched: list[str], others: list[str]) -> None:
    assert not unusable_settings({"rank_pattern": {pattern: 2}})
    found = Settings(8, 16, rank_pattern={pattern: 2})
    assert [found.rank_of(module) for module in matched] == [2] * len(matched)
    assert [found.rank_of(module) for module in others] == [8] * len(others)


# What would keep Python's own matching busy for ever, and the longest name that it does not.
ENDLESS = [
    "(a+)+$", "(a*)*b", "(a|a)*b", "(.*)*x", "(a|a)" * 30, "(aa|a.)" * 25, r"\\*" * 20 + "x", ".*.*.*x", "a*" * 20,
    ".*.*(.|..)(.|..)x", "a{1,99}" * 9 + "b", "((.|..)|(.|..))*x",
]  # fmt: skip
TOO_MUCH = ["(a{1,99}){20000}b", "(a{1,99}){1,99}b", "a{1000}b{1000}c{1000}", "(\\w{500}|a)b{500}" * 9]
NO_PATTERN = [
    r"(.)(.)\2", r"(a)\1", "(a", "a)(b", "[a", "**", "[[a]", "[^[a]", "[a--b]", "[a||b]", "a" * 513, "a++", "a*+",
    "a?+", "(?>a)", "(?<=a)b", "(?<!a)b", "(?#a)b", "a{99999999999999999999}", "(?!x)a",
    "(?=a)b", "a{,2}", r"a\0", "[[:alpha:]]", "(é|è)", r"a\Z", "(?i)(a)",
]  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("pattern", ENDLESS, ids=lambda given: given[:12])
def test_a_pattern_that_could_run_for_ever_is_matched_without_going_back(pattern: str) -> None:
    assert not unusable_settings({"alpha_pattern": {pattern: 2}})
    found = [Settings(8, 8, rank_pattern={pattern: 2}).rank_of(name) for name in WORST_NAMES]
    short = [name[:8] for name in WORST_NAMES]
    wanted = [peft_chooses({pattern: 2}, name, 8) for name in short]
    assert [Settings(8, 8, rank_pattern={pattern: 2}).rank_of(name) for name in short] == wanted
    assert set(found) <= {2, 8}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", [*TOO_MUCH, *NO_PATTERN], ids=lambda given: given[:12])
def test_a_pattern_that_is_none_or_too_much_is_refused(tmp_path: Path, key: str, pattern: str) -> None:
    folder = write(tmp_path, {key: {"q_proj": 8, pattern: 8}}, {"a" * 498: 8})
    with pytest.raises(UsageError, match=f"^{re.escape(f'{folder / CONFIG}: {key}: {pattern!r} ')}(is|has) "):
        check(folder)


WILD = st.sampled_from(
    ["a", ".", "|", "(", ")", ".*", r"\w+", r"\\*", "[ab]*", "(a|a)", "(.|..)", r"\.+", "^", "$", "(?!", "(?=", "{1,3}"]
)
WORST_NAMES = ["." * 512, "a" * 511 + "!", "a." * 256, "aa" * 255 + "ab", "\\" * 512, "a" * 30 + "!"]


@pytest.mark.timeout(50)
@settings(max_examples=60)
@given(st.lists(WILD, min_size=1, max_size=40).map("".join))
@example("(((a*)*)*)*b")
@example("((.*.*)*.*)*x")
@example(".*.*[xy]")
@example(r".+\w+\d")
@example(".*(" + "|".join(["a.", "..", "b"] * 15) + ")x")
@example(".*.*(.|..|...|....)x")
@example("(" + "|".join("ab." * 16) + ")" + "(" + "|".join("ab." * 15) + ")x")
@example("(.|..)(.|..)x")
@example("(((.|..)|(.|..))|(.|..))x")
def test_a_pattern_that_is_accepted_is_quick_on_any_name(pattern: str) -> None:
    if not unusable_settings({"rank_pattern": {pattern: 4}}):
        found = Settings(8, 8, rank_pattern={pattern: 4})
        for name in WORST_NAMES:
            found.rank_of(name)


@pytest.mark.timeout(50)
def test_a_pattern_for_every_module_of_a_large_model_is_quick(tmp_path: Path) -> None:
    """As EVA writes them: a rank of its own for every module."""
    modules = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(126) for name in "qkvougde"]
    ranks = {module: at % 7 + 1 for at, module in enumerate(modules)}
    write(tmp_path, {"rank_pattern": ranks, "alpha_pattern": ranks}, ranks)
    found = check(tmp_path)
    assert {found.scaling_of(module, rank) for module, rank in ranks.items()} == {1.0}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_are_too_much_together_are_refused(tmp_path: Path, key: str) -> None:
    """Each of them takes a part of a second on each of these names."""
    worst = {f"(.?){{0,150}}[{'x' * (at + 1)}]": 8 for at in range(80)}
    assert not unusable_settings({key: worst})
    write(tmp_path, {key: worst}, {"." * 490 + str(at): 8 for at in range(20)})
    with pytest.raises(UsageError, match=rf"{CONFIG}: its patterns are too much for 20 modules"):
        check(tmp_path)


def test_more_patterns_than_are_kept_compiled_are_refused() -> None:
    patterns = {f"layers.{at}": 8 for at in range(4097)}
    assert unusable_settings({"rank_pattern": patterns}) == "rank_pattern has 4097 patterns; 4096 are the limit"
    patterns.popitem()
    assert unusable_settings({"rank_pattern": patterns, "alpha_pattern": patterns}) == ""
