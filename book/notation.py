"""The notation of the docstrings, read as mathematics: `W' = W + s B A` becomes LaTeX.

A line there mixes formulas and words: "A: (r, in), B = 0 at the start". `pieces` tells them apart; `latex` sets one
formula. The rules are few: letters side by side are multiplied, `_` and `^` begin what is below and above, `*` between
matrices is the elementwise product, `(x)` the Kronecker product, a word is a name if the code or a formula calls it so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

GREEK = {"alpha": "\\alpha", "beta": "\\beta", "gamma": "\\gamma", "lambda": "\\lambda", "theta": "\\theta",
         "mu": "\\mu", "rho": "\\rho", "pi": "\\pi", "eps": "\\varepsilon"}
FUNCTIONS = {"softmax", "sigmoid", "diag", "sqrt", "sum", "exp", "min", "max", "ceil", "floor", "relu", "Re",
             "conj", "MLP", "BiLSTM", "LN", "GELU", "Wishart", "Attention", "model", "shadow", "len"}
APPLIED = {"log", "mean", "cos", "sin"}  # functions written without parentheses
# words that are names where an operator stands beside them
NAMES = {"dim", "tokens", "kernel", "width", "taps", "experts", "groups", "layers", "adapters", "batch", "length",
         "heads", "hidden", "depth", "sparsity", "nblocks", "tasks", "ranks", "skills", "scale", "loss"}
OPERATORS = {"=": "=", "+": "+", "-": "-", "/": "/", "<=": "\\le", "<-": "\\leftarrow", "->": "\\to", "~": "\\sim",
             "<": "<", ">": ">", "...": "\\dots", "..": "\\dots", ",": ",", ";": ";", ":": ":\\;", "(": "(", ")": ")",
             "[": "[", "]": "]", "|": "|", ".": "\\cdot", "*": "\\odot"}
TOKEN = re.compile(r"`[^`]*`|https?://\S*[\w/]|[A-Za-z]{2,}'s\b"
                   r"|[a-z]\w{2,}=(?:\"[^\"]*\"|\w[\w.]*)|(?<=\))_\w+|\d+e-?\d+|\d+(?:\.\d+)?|[A-Za-z][A-Za-z0-9]*(?:[~'])?(?:_\([^()]*\)\w*|_\w+(?:-\w+)?)?"
                   r"|\^(?:\([^()]*\)|-?\w+(?:[-/]\w+)?)|'|<=|<-|->|\.\.\.|\.\.|\S|\s+")
GROUP = re.compile(r"\((?:[^()]|\([^()]*\))*,(?:[^()]|\([^()]*\))*\)")
# a field of a configuration: init_r, not W_up
FIELD = re.compile(r"(?!sum_|[A-Za-z]{1,2}\d?'?~?_|(?:alpha|theta)_.$)[A-Za-z]\w+_\w+|[a-z]_[a-z]{4,}")


def pieces(text: str) -> Iterator[tuple[str, str]]:
    """The parts of a line in turn: ("math", formula), ("code", name) or ("text", words)."""
    tokens = TOKEN.findall(text)
    shapes = [m.span() for m in GROUP.finditer(text) if is_shape(m[0])]
    kinds, at = [], 0
    for number, token in enumerate(tokens):
        inside = any(a <= at < b for a, b in shapes)
        kinds.append("space" if token.isspace() else "math" if inside else kind_of(number, tokens))
        at += len(token)
    settle(tokens, kinds)
    run: list[str] = []
    current = "text"
    for token, kind in zip(tokens, kinds):
        if kind != current and run:
            yield current, "".join(run)
            run = []
        current = kind
        run.append(token)
    if run:
        yield current, "".join(run)


def is_shape(group: str) -> bool:
    """Whether what stands in parentheses is a list of sizes: (out, in / n), not (so, as it were, a remark)."""
    return all(re.fullmatch(r"[\w*]+( ?[*/+-] ?\w+)*|\d \w+", part.strip())
               for part in re.sub(r"[()]", "", group).split(",") if part.strip())


def kind_of(number: int, tokens: list[str]) -> str:
    """Whether a token is of a formula, of words, or of either ("open"), seen by itself and its neighbours."""
    token = tokens[number]
    if token.startswith("`") or re.match(r"[a-z]\w{2,}=", token):
        return "code"
    if token.startswith("http") or token.endswith("'s"):
        return "link" if token.startswith("http") else "text"
    if not re.match(r"[A-Za-z]", token):
        return "math" if re.match(r"[=+^~_|*/\[\]\d<>]|->|\.\.", token) else "open"
    word = re.match(r"[A-Za-z]+", token)[0]  # type: ignore[index]
    if FIELD.fullmatch(token):
        return "math"
    if "_" in token or token[-1] in "'~":
        return "math" if len(word) <= 2 or word in FUNCTIONS else "text"
    if token in GREEK or token in ("dW", "dL", "dA", "dh"):
        return "math"
    before = next((t for t in reversed(tokens[:number]) if not t.isspace()), "")
    after = next((t for t in tokens[number + 1:] if not t.isspace()), "")
    if token in FUNCTIONS:
        return "math" if after[:1] in ("(", "_", "|", "^") else "text"
    if token in APPLIED:
        return "math" if re.fullmatch(r"[a-z](_\w+)?|\(|softmax", after) else "text"
    if token in ("a", "I", "A"):
        if re.match(r"[=+*/^]", before) or before + after == "()":
            return "math"
        if token == "a" and re.match(r"[:=_^]|[,b-z]$", after):
            return "math"
        if token == "a":
            return "text"
        plain = re.match(r"[a-z]{2,}('s)?$", after) and after not in ("and", "is", "are", "or", "of", "has")
        return "text" if plain and before in ("", ".") and token == "A" else "math"
    if len(word) == 1 and len(token) <= 2:
        return "math"
    near = before + after == "()" or re.match(r"[=+*/^_]", after) or re.match(r"[=+*/^-]", before)
    return "math" if near and (token in NAMES or token in ("in", "out")) else "text"


def settle(tokens: list[str], kinds: list[str]) -> None:
    """Give spaces and punctuation to the formula if formulas stand on both sides, else to the words."""
    opened: list[int] = []
    for number, (token, kind) in enumerate(zip(tokens, kinds)):
        if kind == "open" and token in "()":
            if token == "(":
                opened.append(number)
            elif opened:
                first = opened.pop()
                inner = kinds[first + 1:number]
                outer = kinds[first - 1] if first else "text"
                inside = "text" not in inner and "code" not in inner and ("math" in inner or outer == "math")
                kinds[first] = kinds[number] = "math" if inside else "text"
    for number, (token, kind) in enumerate(zip(tokens, kinds)):
        if kind not in ("space", "open"):
            continue
        before = next((k for k in reversed(kinds[:number]) if k != "space"), "text")
        after = next((k for k in kinds[number + 1:] if k not in ("space", "open")), "text")
        joins = token.isspace() or token in ":-'." or (token in ",;" and after == "math")
        kinds[number] = "math" if before == after == "math" and joins else "text"
    for number, token in enumerate(tokens):  # a full stop or comma at the end of a formula belongs to the sentence
        if token in (".", ",", ";", ":") and kinds[number] == "math" and "math" not in kinds[number + 1:]:
            kinds[number] = "text"


def latex(formula: str) -> str:
    """A formula as LaTeX."""
    tokens = TOKEN.findall(re.sub(r"(?<= )\(x\)(?= )", "⊗", formula))
    words = roots([t for t in tokens if not t.isspace()])
    spaced = {}  # index among `words` -> whether a space stands before it
    index = 0
    space = False
    for token in tokens:
        if token.isspace():
            space = True
        else:
            spaced[index], space, index = space, False, index + 1
    found: list[str] = []
    for number, token in enumerate(words):
        before, after = (words[number - 1] if number else ""), (words[number + 1] if number + 1 < len(words) else "")
        set_ = atom(token, before, after)
        if spaced[number] and found and product(before, token):
            set_ = "\\," + set_
        found.append(set_)
    return bars(" ".join(found))


def roots(words: list[str]) -> list[str]:
    """The tokens, with braces in place of the parentheses after `sqrt`."""
    words = list(words)
    for number, token in enumerate(words[:-1]):
        if token == "sqrt" and words[number + 1] == "(":
            depth = 0
            for end in range(number + 1, len(words)):
                depth += {"(": 1, ")": -1}.get(words[end], 0)
                if not depth:
                    words[number], words[number + 1], words[end] = "√", "⟨", "⟩"
                    break
    return words


def product(before: str, token: str) -> bool:
    """Whether two tokens side by side are multiplied, so that a thin space belongs between them."""
    return bool(re.match(r"[\w)\]|'^]", before[-1:]) and re.match(r"[A-Za-z(\[|0-9]", token))


def atom(token: str, before: str, after: str) -> str:
    if token in ("*", "⊗"):
        scalar = re.fullmatch(r"[\d.]+|eps|r|s|layers|tokens", before) or re.fullmatch(r"[\d.]+", after)
        if token == "*" and (before in (",", "(") or before == ""):
            return "{*}"
        return "\\otimes" if token == "⊗" else "\\cdot" if scalar else "\\odot"
    if token == "-" and re.fullmatch(r"\d+(\.\d+)?|[A-Za-z]", after) and before in ("", "(", ",", "["):
        return "{-}"
    if token in "√⟨⟩":
        return {"√": "\\sqrt", "⟨": "{", "⟩": "}"}[token]
    if token.startswith("_"):
        return "_{" + script(token[1:]) + "}"
    if token in OPERATORS:
        return OPERATORS[token]
    if token == "'":
        return "{}'"
    if token.startswith("^"):
        return "^{" + script(token[1:]) + "}"
    if power := re.fullmatch(r"(\d+)e(-?\d+)", token):
        return (f"{power[1]} \\cdot " if power[1] != "1" else "") + f"10^{{{power[2]}}}"
    if times := re.fullmatch(r"x_(\d)", token):
        return f"\\times_{{{times[1]}}}"
    if not re.match(r"[A-Za-z]", token):
        return token.replace("%", "\\%").replace("#", "\\#")
    return name(token)


def name(token: str) -> str:
    """A name with what is below it."""
    if FIELD.fullmatch(token) and token.split("_")[0] not in GREEK:
        return "\\mathtt{" + token.replace("_", "\\_") + "}"
    base, _, below = token.partition("_")
    prime, base = ("'" if base.endswith("'") else ""), base.rstrip("'")
    tilde, base = base.endswith("~"), base.rstrip("~")
    digits = re.fullmatch(r"([A-Za-z])(\d+)", base)
    if digits and not below:
        base, below = digits[1], digits[2]
    if base in GREEK:
        shown = GREEK[base]
    elif base in ("dL", "dA", "dh"):
        shown = f"\\partial {base[1]}"
    elif base == "dW":
        shown = "\\Delta W"
    elif base in ("sum", "cos", "sin", "log", "exp", "min", "max"):
        shown = "\\" + base
    elif len(base) == 1:
        shown = base
    else:
        shown = f"\\mathrm{{{base}}}"
    shown = f"\\tilde{{{shown}}}" if tilde else shown
    return shown + (f"_{{{script(below)}}}" if below else "") + prime


def script(text: str) -> str:
    """What stands below or above."""
    text = text[1:-1] if re.fullmatch(r"\([^()]*\)", text) else text
    if text == "T":
        return "\\top"
    if re.fullmatch(r"[A-Za-z]{2,}", text) and text not in GREEK and len(text) > 2:
        return f"\\mathrm{{{text}}}"
    return re.sub(r"[a-z]{3,}", lambda m: GREEK.get(m[0], f"\\mathrm{{{m[0]}}}"), text.replace("-", "{-}"))


def bars(text: str) -> str:
    """Vertical bars in pairs, so that they are set as the two sides of a norm."""
    if text.count(" | ") + text.startswith("| ") + text.endswith(" |") + text.count("|") < 2 or text.count("|") % 2:
        return text
    sides = iter("lr" * text.count("|"))
    set_ = {"l": "{\\lVert", "r": "\\rVert}"}
    return re.sub(r"\|", lambda m: set_[next(sides)], text)


def matrix(lines: list[str]) -> str | None:
    """LaTeX for an equation of matrices drawn over several lines, or None if these are not one."""
    rows = [re.findall(r"\|([^|]*)\|", line) for line in lines]
    if len(rows) < 2 or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        return None
    equals = next((line for line in lines if "=" in line), "")
    place = len(re.findall(r"\|[^|]*\|", equals.split("=")[0]))
    drawn = []
    for number in range(len(rows[0])):
        cells = [" & ".join(latex(cell) for cell in re.split(r"\s{2,}", row[number].strip())) for row in rows]
        drawn.append("\\begin{pmatrix} " + " \\\\ ".join(cells) + " \\end{pmatrix}")
    return " ".join(drawn[:place]) + " = " + " \\, ".join(drawn[place:])
