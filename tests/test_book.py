"""The book: what its chapters write by hand equals minipeft, and every method has its page. `nox -s book` builds it."""

import importlib
import re

import pytest
import torch

import minipeft
from book import blocks, notation
from book.exercises import checks
from book.method_files import code, count, described, forms, methods, path_of
from minipeft import PeftType
from minipeft.core import registry

FROM_NOTHING = sorted(blocks.FOLDER.glob("*-from-nothing.md"))


@pytest.mark.parametrize("file", FROM_NOTHING, ids=lambda file: file.stem)
def test_from_nothing_is_minipeft(file):
    """The numbers of a chapter's own code are those of minipeft, whose code the chapter runs, too."""
    _, _, names = blocks.run(file, {})
    assert names["theirs"] < 1e-5


def test_lora_from_nothing():
    """The first chapter: the count, a start that changes nothing, training, the bits of the merged weight."""
    title, found, names = blocks.run(FROM_NOTHING[0], {})
    assert title == "LoRA from nothing"
    model = minipeft.get_peft_model(names["network"](), minipeft.LoraConfig(r=4, target_modules=["0", "2"]))
    assert names["count"] == model.get_nb_trainable_parameters()[0] == 616
    assert [block.shown for block in found if block.shown in (True, False)] == [True, True, True]
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    assert torch.equal(names["merged"][2].weight, names["model"][2].weight)
    written = "\n".join(block.text for block in found[:20] if block.kind == "python")
    assert len([line for line in written.splitlines() if line.strip()]) < 70


@pytest.mark.parametrize("name", checks.CHECKS)
def test_exercises(name):
    """Each answer passes its check, and what one begins with does not."""
    checks.CHECKS[name](importlib.import_module(f"book.exercises.answers.{name}"))
    with pytest.raises((AssertionError, NotImplementedError)):
        checks.CHECKS[name](importlib.import_module(f"book.exercises.{name}"))


def test_a_stale_block_fails(tmp_path):
    file = tmp_path / "x.md"
    for wrong in ("```python\nassert 1 + 1 == 3\n```\n", "{{ unknown }}\n", "```python raises\n1\n```\n"):
        file.write_text("# X\n\n" + wrong)
        with pytest.raises(blocks.Stale):
            blocks.run(file, {})


def test_every_method_has_a_page():
    paths = [path_of(method) for method in methods()]
    assert len(set(paths)) == len(paths) > 50
    assert {method.peft_type for method in methods()} == {PeftType(name) for name in registry.FILES}
    files = {method.cls.__module__ for method in methods()}
    assert {method.cls.__module__ for method in described()} == files


def test_the_digits_have_every_method():
    for package in ("sklearn", "adjustText", "matplotlib"):
        pytest.importorskip(package, reason="the extra `examples` is not installed")
    from book import texts
    from book.training import file_of
    from examples import digits

    rows = {file_of(getattr(minipeft, method.config)(**method.options)) for method in digits.METHODS}
    assert rows == {method.cls.__module__ for method in methods()}
    assert set(texts.DECODERS) <= {method.name for method in digits.METHODS}


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.name)
def test_formulas_are_mathematics(method):
    """The docstring's formulas become LaTeX whose braces match; nothing of the text is lost on the way."""
    for line in method.doc.splitlines():
        pieces = list(notation.pieces(line))
        assert "".join(text for _, text in pieces) == line
        for kind, text in pieces:
            made = notation.latex(text) if kind == "math" else ""
            depth = [made[:n].count("{") - made[:n].count("}") for n in range(len(made) + 1)]
            assert min(depth) == depth[-1] == 0, made
    main = next(line for line in method.doc.splitlines()[1:] if line.startswith("    ")).strip()
    first = re.split(r"\s{2,}", main)[0].rstrip(",")
    kinds = {kind for kind, text in notation.pieces(first) if text.strip()}
    assert kinds == {"math"} or method.kind == "prompt"


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.name)
def test_counts_can_be_computed_on_a_page(method):
    """What the calculator evaluates is an expression of JavaScript, too: names, numbers and its operators."""
    for terms, _ in forms(count(method.doc)):
        for term, _ in terms:
            assert re.fullmatch(r"(\w+|\d+\.?\d*|\*\*|[-+*/(),]|\s)+", code(term)), term


@pytest.mark.parametrize(("written", "latex"), [
    ("W' = W + s B A", r"W' = W + s \,B \,A"),
    ("m * (W + s B A) / |W + s B A|", r"m \odot ( W + s \,B \,A ) / {\lVert W + s \,B \,A \rVert}"),
    ("alpha / sqrt(r)", r"\alpha / \sqrt { r }"),
    ("W1 (x) W2", r"W_{1} \otimes W_{2}"),
    ("A_e: (r_e, in)", r"A_{e} :\; ( r_{e} , \mathrm{in} )"),
    ("(I - Q)(I + Q)^-1", r"( I - Q ) ( I + Q ) ^{{-}1}"),
    ("init_r (in + out + 1)", r"\mathtt{init\_r} \,( \mathrm{in} + \mathrm{out} + 1 )"),
])
def test_notation(written, latex):
    assert notation.latex(written) == latex
