"""What users' formulas may say, and what they are told to write instead of all else."""

import ast
import functools
import inspect
import math
import pickle
import textwrap
from types import FunctionType

import pytest

from fastopt import formula
from fastopt import formula as m
from fastopt.errors import FormulaError
from fastopt.front.written import read

AHEAD = """\
import math
import numpy as np
import torch
import fastopt
from fastopt import formula as m
from fastopt.formula import sign
HALF = 0.5
INFINITY = math.inf
TABLE = torch.ones(3)
def helper(x):
    return x
"""


def written(tmp_path, text):
    """The function f of a file with this text, and the number of the line that has `# here`."""
    text = AHEAD + textwrap.dedent(text)
    file = tmp_path / f"rule_{abs(hash(text))}.py"
    file.write_text(text)
    names = {"__name__": file.stem}
    exec(compile(text, str(file), "exec"), names)
    marked = [k for k, line in enumerate(text.splitlines(), 1) if "# here" in line]
    return names["f"], (marked or [len(AHEAD.splitlines()) + 1])[0]


def unparsed(function):
    return [(a.name, ast.unparse(a.value)) for a in function.assignments], [
        ast.unparse(value) for value in function.returned
    ]


def test_what_a_formula_says():
    def rule(param, grad, exp_avg, *, step, lr=1e-3, power=2, nesterov=True):
        """With words."""
        half: float = 0.5
        grad = +grad * -1
        grad += half
        way = m.where(nesterov, formula.sign(grad), exp_avg)
        return param - lr * way / (1 - lr**step) ** power, grad

    found = read(rule, given=("step",))
    assert found.tensors == ("param", "grad", "exp_avg")
    assert found.options == {"lr": 1e-3, "power": 2, "nesterov": True}
    assert list(map(type, found.options.values())) == [float, int, bool]
    assert (found.given, found.results, found.function) == (("step",), 2, rule)
    assert unparsed(found) == (
        [
            ("half", "0.5"),
            ("grad", "grad * -1.0"),
            ("grad", "grad + half"),
            ("way", "where(nesterov, sign(grad), exp_avg)"),
        ],
        ["param - lr * way / (1.0 - lr ** step) ** power", "grad"],
    )
    lines, first = inspect.getsourcelines(rule)
    place = next(k for k, line in enumerate(lines) if "return" in line)
    assert found.file == __file__
    assert found.tree.body[-1].lineno == first + place
    found.expect_results(("param", "exp_avg"))
    with pytest.raises(FormulaError, match=r"2 returned; return 3 values: param, a, b"):
        found.expect_results(("param", "a", "b"))
    with pytest.raises(FormulaError, match=r"2 returned; return one value: param"):
        found.expect_results(("param",))


def test_numbers_of_outside_are_kept_as_they_are(tmp_path):
    rule, _ = written(
        tmp_path,
        """
        def outer(scale):
            def f(x):
                return scale * sign(x) * HALF + INFINITY - fastopt.formula.exp(x)
            return f
        f = outer(-3)
        """,
    )
    found = read(rule)
    rule.__globals__["HALF"] = 7.0
    assert unparsed(found) == ([], ["-3.0 * sign(x) * 0.5 + 1e309 - exp(x)"])
    assert unparsed(read(rule)) == ([], ["-3.0 * sign(x) * 7.0 + 1e309 - exp(x)"])


REFUSED = {
    "torch": ("return torch.exp(x)", r"`torch.exp\(x\)`: not of the vocabulary; write m.exp\("),
    "math": ("return math.log1p(x)", r"write m.log1p\("),
    "numpy": ("return np.maximum(x, 0)", r"write m.maximum\("),
    "abs": ("return abs(x)", r"write m.abs(olute)?\("),
    "max": ("return max(x, 0.0)", r"write m.maximum\("),
    "clamp": ("return x.clamp(0, 1)", r"no methods; write m.minimum\(m.maximum\(x, low\), high\)"),
    "method": ("return x.exp()", r"numbers have no methods; write m.exp\("),
    "relu": ("return torch.relu(x)", r"write m.maximum\(x, 0.0\)"),
    "square": ("return torch.square(x)", r"write x \* x"),
    "pow": ("return math.pow(x, 2)", r"write x \*\* y"),
    "sum": ("return x.sum()", r"a formula sees one element of each tensor"),
    "helper": ("return helper(x)", r"write out what helper computes"),
    "typo": ("return m.sgin(x)", r"did you mean m.sign\?"),
    "no such function": ("return m.gamma(x)", r"which has: .*where"),
    "unknown name": ("return x * lrr", r"`lrr`: an unknown name; did you mean lr\?"),
    "unknown function": ("return sgn2(x)", r"an unknown name"),
    "too early": ("y = z\n    z = x\n    return y", r"z is used ahead of its first"),
    "if": ("if x > 0:  # here\n        x = -x\n    return x", r"write m.where\(condition"),
    "while": ("while x > 0:  # here\n        x = -x\n    return x", r"a loop"),
    "for": ("for k in range(3):  # here\n        x = -x\n    return x", r"a loop"),
    "expression": ("return x if x > 0 else -x", r"write m.where\(condition"),
    "and": ("return m.where(x > 0 and x < 1, x, lr)", r"nest them: m.where\(a, m.where"),
    "bits": ("return m.where((x > 0) & (x < 1), x, lr)", r"nest them"),
    "not": ("return m.where(not x > 0, x, lr)", r"swap the sides"),
    "chain": ("return m.where(0 < x < 1, x, lr)", r"two numbers at a time"),
    "is": ("return m.where(x is lr, x, lr)", r"compare numbers with <"),
    "no number": ("return x > 0", r"true or false, where a number is due"),
    "sum of conditions": ("return (x > 0) * x", r"`x > 0`: true or false"),
    "no condition": ("return m.where(x, x, lr)", r"`x`: a number, where a condition is due"),
    "early return": ("return x  # here\n    return x", r"an early return"),
    "return in a branch": ("if x > 0:  # here\n        return x\n    return -x", r"a branch"),
    "no return": ("y = x  # here", r"nothing is returned"),
    "empty return": ("return", r"nothing is returned"),
    "docstring alone": ('"""Words."""  # here', r"nothing is returned"),
    "subscript": ("return x[0]", r"an element has no others"),
    "attribute": ("return x.grad", r"numbers, which have none"),
    "number of a module": ("return x * math.pi", r"PI = …"),
    "unpacking": ("a, b = x, x  # here\n    return a", r"assign to one plain name"),
    "two targets": ("a = b = x  # here\n    return a", r"assign to one plain name"),
    "element target": ("x[0] = 1.0  # here\n    return x", r"assign to one plain name"),
    "declaration": ("a: float  # here\n    return x", r"assign to one plain name"),
    "tuple": ("a = (x, x)  # here\n    return a", r"a tuple"),
    "walrus": ("return (y := x)", r"a line of its own"),
    "lambda": ("return (lambda y: y)(x)", r"call functions by their names"),
    "floor division": ("return x // 2", r"they have \+ - \* / \*\*"),
    "modulo": ("return x % 2", r"they have \+ - \* / \*\*"),
    "matrix product": ("return x @ x", r"they have \+ - \* / \*\*"),
    "string": ("return x + 'a'", r"a str, where a formula has numbers"),
    "true": ("return x + True", r"a bool, where a formula has numbers"),
    "complex": ("return x * 1j", r"a complex, where a formula has numbers"),
    "huge": (f"return x * 1{'0' * 400}", r"no number that a formula can have"),
    "tensor of outside": ("return x * TABLE", r"make it an int, a float or an option"),
    "module": ("return x * math", r"module math, where a formula has numbers"),
    "not called": ("return x * m.sign", r"a function is called"),
    "not called by name": ("return x * sign", r"a function is called"),
    "keyword": ("return m.where(x > 0, a=x, b=x)", r"by position"),
    "too few": ("return m.maximum(x)", r"maximum takes 2 arguments, and 1 are given"),
    "starred": ("return m.maximum(*x)", r"maximum takes 2 arguments"),
    "unused": ("m.exp(x)  # here\n    return x", r"leave it out"),
    "assert": ("assert x  # here\n    return x", r"an assertion"),
    "print": ("print(x)  # here\n    return x", r"not of the vocabulary"),
    "import": ("import math  # here\n    return x", r"import ahead"),
    "global": ("global HALF  # here\n    return x", r"return the value"),
    "raise": ("raise ValueError  # here\n    return x", r"can't raise"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_to_write_instead(tmp_path, case):
    body, words = REFUSED[case]
    if "# here" not in body:
        first, *more = body.split("\n", 1)
        body = "\n".join([f"{first}  # here", *more])
    rule, line = written(tmp_path, f"\ndef f(x, *, lr=0.1):\n    {body}\n")
    with pytest.raises(FormulaError, match=words) as caught:
        read(rule)
    line -= case == "docstring alone"  # nothing of its body, but the def
    assert caught.value.line == line
    assert caught.value.file == rule.__code__.co_filename
    assert str(caught.value).startswith(f"{caught.value.file}:{line}: in f")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.line) == (str(caught.value), line)


SIGNATURES = {
    "default": ("x, lr=0.1", r"put lr behind a \*"),
    "positional": ("x, /", r"leave the / out"),
    "stars": ("*x", r"name each parameter instead of \*x"),
    "two stars": ("x, **options", r"name each parameter instead of \*\*options"),
    "nothing": ("", r"no tensors"),
    "options alone": ("*, lr=0.1", r"no tensors"),
    "no default": ("x, *, lr", r"lr has no default; give it a number; .*: step"),
    "none": ("x, *, lr=None", r"default of lr is None, of type NoneType"),
    "mutable": ("x, *, betas=[0.9]", r"default of betas is \[0.9\], of type list"),
    "tensor": ("x, *, lr=TABLE", r"of type Tensor; it has to be a bool, an int or a float"),
    "nan": ("x, *, lr=math.nan", r"default of lr is nan"),
    "given with a default": ("x, *, step=1", r"step is always given"),
    "given by position": ("x, step", r"step is a number: put it behind a \*"),
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_refused_parameters(tmp_path, case):
    parameters, words = SIGNATURES[case]
    rule, line = written(tmp_path, f"\ndef f({parameters}):  # here\n    return 1.0\n")
    with pytest.raises(FormulaError, match=words) as caught:
        read(rule, given=("step",))
    assert caught.value.line == line


def test_no_function_of_a_file():
    with pytest.raises(TypeError, match="not builtin_function_or_method"):
        read(math.exp)
    with pytest.raises(TypeError, match="not partial"):
        read(functools.partial(read, None))
    with pytest.raises(FormulaError, match="a lambda; write a function with def"):
        read(lambda x: x)

    @functools.wraps(read)
    def wrapper(x):
        return x

    with pytest.raises(TypeError, match="wrapped by another decorator"):
        read(wrapper)
    names: dict[str, FunctionType] = {}
    exec("def f(x):\n    return x\n", names)
    with pytest.raises(FormulaError, match="define it in a file or a notebook's cell"):
        read(names["f"])

    async def later(x):
        return x

    with pytest.raises(FormulaError, match="later is an async def"):
        read(later)


def test_a_file_that_has_been_edited_since(tmp_path):
    rule, _ = written(tmp_path, "\ndef f(x, *, lr=0.1):\n    return x * 2.0\n")
    file = rule.__code__.co_filename
    with open(file) as opened:
        text = opened.read()
    assert unparsed(read(rule)) == ([], ["x * 2.0"])
    for other in ("x * 3.0", "x / 2.0", "x * lr"):
        with open(file, "w") as opened:
            opened.write(text.replace("x * 2.0", other))
        with pytest.raises(FormulaError, match="what its source says any more"):
            read(rule)
    with open(file, "w") as opened:
        opened.write("\n\n" + text)
    with pytest.raises(FormulaError, match="what its source says any more"):
        read(rule)
