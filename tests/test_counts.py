"""The count of trained parameters that each method file states is the real one."""

import pytest

from book.method_files import count, described, evaluated, forms
from book.small import configuration, trained, values
from minipeft.model.prompt import PROMPTS

CASES = [
    pytest.param(m.peft_type, m.cls, form, id=f"{m.peft_type.value}-{m.cls.__name__}-{number}")
    for m in described()
    for number, form in enumerate(forms(count(m.doc) or "nothing"))
]


@pytest.mark.parametrize(("peft_type", "cls", "form"), CASES)
def test_stated_count_is_real(peft_type, cls, form, tmp_path):
    terms, fields = form
    if terms == [("nothing", False)]:
        pytest.fail(
            f"{cls.__module__}: its docstring lacks a line like `parameters  r (in + out)`; see CONTRIBUTING.md"
        )
    config = configuration(peft_type, cls, fields)
    for depth in (1,) if peft_type in PROMPTS else (1, 2, 3):
        real = trained(peft_type, config, depth, tmp_path)
        stated = sum(evaluated(term, values(config)) * (1 if once else depth) for term, once in terms)
        assert stated == pytest.approx(real, abs=1e-6), f"{terms} gives {stated} for {depth} layers, not {real}"
