"""Near twins: a program with one thing changed, so that it computes something else.

Two kinds. An *edit* changes one place of the source without knowing what it means: a number by one, a comparison, a
sign, a name, a statement less. A *twist* is one that people make: a decay that moves by a token, a window, |i - j|, a
detached state, the slope of another head.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from random import Random

Place = Callable[[], None]
"""Applies one change to the tree."""

COMPARISONS = (ast.GtE, ast.Gt, ast.LtE, ast.Lt, ast.Eq, ast.NotEq)
DROPPED = (
    "tril",
    "triu",
    "exp",
    "cumsum",
    "masked_fill",
    "masked_fill_",
    "clamp",
    "abs",
    "log",
    "mT",
    "mul_",
    "flip",
    "clone",
)
INSERTED = (
    "{}.detach()", "{}.abs()", "{}.square()", "torch.relu({})", "torch.tanh({})", "{}.flip(-1)", "{}.roll(1, -1)",
    "{}.roll(1, 1)", "{}.cumsum(1)", "{}.cumsum(-1)", "torch.softmax({}, -1)", "{}.round()", "{}.int().float()",
    "{}.clamp(max=0.5)", "{}.clamp(-0.5, 0.5)", "{}.masked_fill({} > 1, 0)", "torch.where({} > 0, {}, 0.0)",
    "({} - {}.mean())", "({} / {}.abs().sum(-1, keepdim=True))", "({} * torch.arange({}.shape[-1]))",
    "({} + 0.25)", "({} * 1.25)", "{}.tril(-1)", "{}.tril(1)", "{}.triu(-2)", "F.dropout({}, 0.0) * 0.5",
    "{}.sin()", "F.pad({}, (1, -1))", "F.normalize({}, dim=-1)", "{}.half().round().float()",
    "{}.to(torch.int8).float()",
)  # fmt: skip


def twin(source: str, seed: int) -> str | None:
    """The source with one change; None if this seed found nothing to change."""
    random = Random(seed)
    tree = ast.parse(source)
    forward = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "forward")
    places = list(random.choice(KINDS)(forward, random))
    if not places:
        return None
    random.choice(places)()
    ast.fix_missing_locations(tree)
    return ast.unparse(tree) + "\n"


def _numbers(f: ast.FunctionDef, random: Random) -> Iterator[Place]:
    """One integer more or less, one float by a factor."""
    for node in ast.walk(f):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            value = (
                node.value + random.choice((-1, 1, 2))
                if type(node.value) is int
                else node.value * random.choice((0.5, 2.0, -1.0))
            )
            yield lambda node=node, value=value: setattr(node, "value", value)


def _comparisons(f: ast.FunctionDef, random: Random) -> Iterator[Place]:
    for node in ast.walk(f):
        if isinstance(node, ast.Compare):
            other = random.choice([c for c in COMPARISONS if not isinstance(node.ops[0], c)])
            yield lambda node=node, other=other: setattr(node, "ops", [other()])


def _operators(f: ast.FunctionDef, random: Random) -> Iterator[Place]:
    """Plus for minus, times for plus, a sign less, operands the other way."""
    for node in ast.walk(f):
        if isinstance(node, ast.BinOp):
            if isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
                other = random.choice([c for c in (ast.Add, ast.Sub, ast.Mult) if not isinstance(node.op, c)])
                yield lambda node=node, op=other: setattr(node, "op", op())
            if isinstance(node.op, ast.Sub | ast.MatMult | ast.Pow):
                yield lambda node=node: (lambda a, b: (setattr(node, "left", b), setattr(node, "right", a)))(
                    node.left, node.right
                )
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield lambda node=node: setattr(node, "op", ast.UAdd())


def _names(f: ast.FunctionDef, random: Random) -> Iterator[Place]:
    """Another variable that exists by then."""
    for statement, known in _statements(f):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in known:
                if len(known) > 1:
                    other = random.choice(sorted(known - {node.id}))
                    yield lambda node=node, other=other: setattr(node, "id", other)


def _statements(f: ast.FunctionDef) -> Iterator[tuple[ast.stmt, set[str]]]:
    """Simple statements, and the local names before each."""
    known = {a.arg for a in f.args.args if a.arg != "self"}

    def walk(body: list[ast.stmt]) -> Iterator[tuple[ast.stmt, set[str]]]:
        for s in body:
            if isinstance(s, ast.For):
                known.update(n.id for n in ast.walk(s.target) if isinstance(n, ast.Name))
                yield from walk(s.body)
            else:
                yield s, set(known)
                known.update(n.id for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))

    yield from walk(f.body)


def _order(f: ast.FunctionDef, random: Random) -> Iterator[Place]:
    """A statement less, twice, or before the one before it."""
    for node in ast.walk(f):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for n, s in enumerate(body):
            if isinstance(s, ast.Return | ast.For):
                continue
            if not isinstance(s, ast.Assign) or not isinstance(s.targets[0], ast.Name):
                yield lambda body=body, n=n: body.__delitem__(n)
            yield lambda body=body, n=n, s=s: body.insert(n, s)
            if n:
                yield lambda body=body, n=n: body.__setitem__(slice(n - 1, n + 1), [body[n], body[n - 1]])


def _calls(f: ast.FunctionDef, random: Random) -> Iterator[Place]:
    """A method call left out, and arguments the other way."""
    for node in ast.walk(f):
        for field, child in ast.iter_fields(node):
            for n, c in enumerate(child) if isinstance(child, list) else [(None, child)]:
                if isinstance(c, ast.Call) and isinstance(c.func, ast.Attribute) and c.func.attr in DROPPED:
                    inner = c.args[0] if _is_module(c.func.value) and c.args else c.func.value
                    yield lambda node=node, field=field, n=n, inner=inner: _put(node, field, n, inner)
        if isinstance(node, ast.Call) and len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args):
            yield lambda node=node: node.args.__setitem__(slice(0, 2), [node.args[1], node.args[0]])


def _is_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("torch", "F", "math")


def _put(node: ast.AST, field: str, n: int | None, value: ast.AST) -> None:
    if n is None:
        setattr(node, field, value)
    else:
        getattr(node, field)[n] = value


def _insertions(f: ast.FunctionDef, random: Random) -> Iterator[Place]:
    """A function around some expression."""
    for statement, _ in _statements(f):
        for node in ast.walk(statement):
            for field, child in ast.iter_fields(node):
                for n, c in enumerate(child) if isinstance(child, list) else [(None, child)]:
                    loaded = isinstance(c, ast.Name) and isinstance(c.ctx, ast.Load) and not _is_module(c)
                    if loaded or isinstance(c, ast.BinOp | ast.Subscript):
                        if isinstance(c, ast.Subscript) and not isinstance(c.ctx, ast.Load):
                            continue
                        made = ast.parse(random.choice(INSERTED).replace("{}", f"({ast.unparse(c)})"), mode="eval").body
                        yield lambda node=node, field=field, n=n, made=made: _put(node, field, n, made)


def _subscripts(f: ast.FunctionDef, random: Random) -> Iterator[Place]:
    """The letters of an einsum, the ends of a slice."""
    for node in ast.walk(f):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "->" in node.value:
            letters = sorted(set(node.value) - set("->,"))
            a, b = random.choice(letters), random.choice(letters)
            swapped = node.value.translate(str.maketrans({a: b, b: a}))
            one = node.value.split(",")
            one[0] = one[0].translate(str.maketrans({a: b, b: a})) if "->" not in one[0] else one[0]
            new = random.choice([swapped, ",".join(one)])
            yield lambda node=node, new=new: setattr(node, "value", new)
        if isinstance(node, ast.Slice):
            for end in ("lower", "upper"):
                old = getattr(node, end)
                if old is not None:
                    new = ast.parse(f"({ast.unparse(old)}) + {random.choice((-1, 1))}", mode="eval").body
                    yield lambda node=node, end=end, new=new: setattr(node, end, new)


TWISTS = {
    "distance": ("({} + 1)", "({} - 1)", "{}.abs()", "-{}", "{} * {}", "{} // 2", "{} % 3", "{}.clamp(max=3)"),
    "weight": ("{}.tril(-1)", "{}.mT", "({} + {}.tril(-1).mT)", "{}.triu(-2)", "{}.roll(1, -1)", "{}.roll(1, -2)",
               "{}.detach()", "{} / {}.sum(-1, keepdim=True)", "{}.cumsum(-1).tril()",
               "{} * (1 + torch.eye({}.shape[-1]))"),
    "difference": ("{} * {}", "{} - 0.1", "{}.abs()", "-{}", "{}.roll(1, -1)", "{}.clamp(min=-0.5)"),
    "exponent": ("{} * {}", "{} - 0.1", "-{}", "{}.clamp(min=-0.5)", "{}.int()", "{} * 2"),
    "run": ("{} * 1.01", "{}.roll(1, -1)", "{}.detach()", "{} + 0.1", "{}.flip(-1)", "{} - {}.mean()"),
    "rate": ("{}.flip(0)", "{}.roll(1)", "{}.detach()", "{}.mean()", "{} - 0.1"),
    "gamma": ("{}.flip(0)", "{}.roll(1)", "{}.detach()", "{}.mean()", "{} * 0.9"),
    "g": ("{}.roll(1, 1)", "{}.roll(1, 2)", "{}.detach()", "{}.cumsum(-1)", "{} * (1 + torch.arange({}.shape[-1]))"),
    "state": ("{} * 0.9", "{}.detach()", "{} * 0", "torch.tanh({})", "{}.clamp(max=1)", "{}.roll(1, 0)"),
    "block": ("{} * {}", "{}.detach()", "{} * 1.01", "1.0"),
    "kept": ("{} * 0.9", "{}.detach()", "{}.relu()", "{} / (1 + {}.norm())"),
    "update": ("{} * 0.9", "{}.detach()", "{}.relu()", "{} - 0.1 * {}.mean()", "{}.cumsum(-1)"),
    "scores": ("torch.softmax({}, -1)", "torch.relu({})", "{}.masked_fill({} > 1, 0)", "{}.abs()", "{}.square()",
               "{} / (1 + {}.abs().sum(-1, keepdim=True))", "{}.detach()", "{}.int().float()"),
    "q_decay": ("{} * {}", "{}.detach()", "{}.flip(-1)", "{}.roll(1, -1)"),
    "k_decay": ("{} * {}", "{}.detach()", "{}.flip(-1)", "{}.roll(1, -1)"),
    "power": ("{} * {}", "{}.detach()", "{} * 0.9", "{}.flip(-1)"),
    "steps": ("{} * {}", "{} + 1", "{} - 1", "{}.flip(0)", "{} // 2"),
    "inter": ("{} * 0.9", "{}.relu()", "{}.detach()", "{}.roll(1, -2)"),
    "before": ("{} * 0.9", "{}.roll(1, 1)", "{}.detach()", "{}.roll(1, 2)"),
}  # fmt: skip


def _twists(f: ast.FunctionDef, random: Random) -> Iterator[Place]:
    """What people get wrong about a value, by what it is."""
    for statement, _ in _statements(f):
        if isinstance(statement, ast.Assign) and isinstance(target := statement.targets[0], ast.Name):
            stem = target.id.rstrip("0123456789")
            if stem in TWISTS:
                text = random.choice(TWISTS[stem]).replace("{}", f"({ast.unparse(statement.value)})")
                new = ast.parse(text, mode="eval").body
                yield lambda statement=statement, new=new: setattr(statement, "value", new)


KINDS = (
    _twists,
    _twists,
    _twists,
    _numbers,
    _comparisons,
    _operators,
    _names,
    _order,
    _calls,
    _insertions,
    _insertions,
    _subscripts,
)
