"""Regular expressions out of configurations: what `re` says, and never for ever."""

import random
import re
import time
import warnings

import pytest
from torch import nn

import minipeft
from minipeft import ConfigError
from minipeft.core import patterns

PATH = "base_model.model.model.layers.10.self_attn.q_proj"
BOMBS = [
    r"(([a-z._0-9]*)*)*!",
    r"(.*.*.*.*.*.*.*.*.*.*)*!",
    r"((a|[a-z])|\w|\.|[0-9])*(\w|\.)*(\w|\.)*!",
    r"(\w+\.?)+(\w+\.?)+(\w+\.?)+!",
    r"(?:(?:\w*\.?)*)*#",
    r".*.*.*.*.*.*.*.*!",
    r"(a?){99999999}!",
    r"(?:\w{1,9}){1,9}(?:\w{1,9}){1,9}!",
    "(" * 40 + r"\w*" + ")*" * 40 + "!",
    "(?:m|m)" * 30 + "!",
    r"(?=(\w*\.?)*!).*",
]
ORDINARY = [  # of peft's documentation, and of other software
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"(.*\.)?(model\.layers\.\d+\.self_attn\.q_proj)",
    r"^(?!.*vision).*(self_attn|mlp)\.(q_proj|k_proj)$",
    r"^model\.decoder\.layers\.[0-3]\..*fc\d",
    r"(?:.*?(?:vision|image|language|text).*?(?:self_attn|attn|mlp).*?(?:q_proj|k_proj|v_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:q_proj|k_proj|v_proj|o_proj)))",
    r"(\w+\.)*q_proj",
    r"(?i).*Q_PROJ",
]


def drawn(rng, depth):
    """A random expression."""
    if not depth:
        parts = ["a", "b", ".", "[ab]", "[^a]", r"\.", r"\d", r"\w", "[a-c]", "^", "$", r"\b", "", r"\S", "A"]
        return rng.choice(parts)
    inner = [drawn(rng, depth - 1) for _ in range(2)]
    repeat = rng.choice(["*", "+", "?", "{2}", "{1,2}", "*?", "+?"])
    behind = rng.choice(["(?<=a)", "(?<=ab)", r"(?<!\.)", "(?<![ab])"])
    forms = ["({0}|{1})", "(?:{0})" + repeat, "(?={0})", "(?!{0})", behind + "{0}", "(?i:{0})", "{0}{1}", "({0}){1}"]
    return rng.choice(forms).replace("{0}", inner[0]).replace("{1}", inner[1])


def test_the_other_way_of_matching_says_what_re_says(monkeypatch):
    rng, met = random.Random(0), 0
    monkeypatch.setattr(patterns, "is_intricate", lambda pattern: True)
    for _ in range(3000):
        pattern = drawn(rng, rng.randrange(1, 5))
        try:
            wanted = re.compile(pattern)
        except re.error:
            continue
        for _ in range(3):
            text = "".join(rng.choice("abA.1\n ") for _ in range(rng.randrange(1, 7)))
            assert patterns.matches(pattern, text) == (wanted.fullmatch(text) is not None), (pattern, text)
            met += patterns.matches(pattern, text)
    assert met > 200


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_expressions_mean_what_they_do(pattern):
    paths = [PATH, "model.layers.3.self_attn.q_proj", "vision.layers.3.mlp.k_proj", "model.decoder.layers.2.x.fc1"]
    patterns.check_pattern(pattern, "target_modules")
    for path in (*paths, "decoder.block.0.SelfAttention.q", "q_proj"):
        assert patterns.matches(pattern, path) == (re.fullmatch(pattern, path) is not None)


def net():
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(dict.fromkeys(
        ("self_attention_query_key_value_projection_of_the_first_kind",), nn.Linear(4, 4)))])})})  # fmt: skip


FIELDS = {
    "target_modules": lambda bomb: minipeft.LoraConfig(target_modules=bomb),
    "exclude_modules": lambda bomb: minipeft.LoraConfig(target_modules=".*projection.*", exclude_modules=bomb),
    "rank_pattern": lambda bomb: minipeft.LoraConfig(target_modules=".*projection.*", rank_pattern={bomb: 2}),
    "alpha_pattern": lambda bomb: minipeft.LoraConfig(target_modules=".*projection.*", alpha_pattern={bomb: 2}),
    "layers_pattern": lambda bomb: minipeft.LoraConfig(
        target_modules=["first_kind"], layers_pattern=bomb, layers_to_transform=[0]
    ),
    "feedforward_modules": lambda bomb: minipeft.IA3Config(target_modules=".*projection.*", feedforward_modules=bomb),
    "n_frequency_pattern": lambda bomb: minipeft.FourierFTConfig(
        target_modules=".*projection.*", n_frequency=2, n_frequency_pattern={bomb: 2}
    ),
    "rank_pattern of OSF": lambda bomb: minipeft.OSFConfig(target_modules=".*projection.*", rank_pattern={bomb: 2}),
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("bomb", BOMBS)
def test_no_expression_runs_for_ever(field, bomb):
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            minipeft.get_peft_model(net(), FIELDS[field](bomb))
        except minipeft.PeftError:
            pass
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("bad", ["(", "*", "(?P<x>", "a{2,1}", "(" * 5000, r"(a*)*\1", "x" * 10**6 + "("])
def test_what_is_no_expression_is_refused_when_the_configuration_is_made(field, bad):
    with pytest.raises(ConfigError, match=field.split(" ")[0]) as error:
        FIELDS[field](bad)
    assert len(str(error.value)) < 1100
