"""What the placement compiler refuses, in words that say what was given, where, and what to do; and
that what it writes is straight-line code."""

from __future__ import annotations

import ast
from concurrent.futures import ThreadPoolExecutor
from queue import Empty
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenspeed import models
from tokenspeed.errors import ConfigError, PlacementError
from tokenspeed.spmd import (
    REPLICATED,
    Bucket,
    Mesh,
    Partial,
    Program,
    Replicate,
    Shard,
    ThreadGroups,
    as_batch,
    compile_model,
    layout,
    module,
    tokens,
)
from tokenspeed.spmd.params import Parameter, Source

STATEMENTS = (ast.Assign, ast.Expr, ast.Delete, ast.Return)


def compiled(*calls: Any, mesh: Mesh, rows: int | None = 8, **kind: Any) -> Program:
    """Modules one after the other, from batch.x [rows, 4] on."""

    def model(params: Any, batch: Any, kv: Any) -> Any:
        value = batch.x
        for index, call in enumerate(calls):
            value = call(params["layers"][index], value)
        return value, kv

    fields = {"x": torch.empty(rows or 1, 4, device="meta")}
    weight = Parameter((Source("w", (8, 4)),))
    tree = {"layers": [{"w": weight} for _ in calls]}
    bucket = Bucket(tokens=rows, fields=fields)
    return compile_model(model, tree, len(calls), mesh=mesh, bucket=bucket, **kind)


def declared(**how: Any) -> Any:
    @module(**how)
    def block(params: Any, x: Tensor) -> Tensor:
        return x

    return block


WHOLE = declared(inputs={"x": tokens()}, outputs=tokens())


def test_both_placements_the_module_the_mesh_and_the_fix_are_named() -> None:
    wants = declared(inputs={"x": layout(tp=Partial())})
    with pytest.raises(PlacementError) as caught:
        compiled(WHOLE, wants, mesh=Mesh.of(dp=2, tp=2))
    text = str(caught.value)
    for part in (
        "layers.1:block wants P@tp of x",
        "layers.0:block gives R",
        "on the mesh dp=2,tp=2",
        "along tp nothing turns R into summands",
        "Declare another input placement for layers.1:block or another output of layers.0:block",
    ):
        assert part in text


def test_a_dim_that_does_not_divide_is_named() -> None:
    cut = declared(inputs={"x": layout(tp=Shard(0))}, outputs=layout(tp=Shard(0)))
    with pytest.raises(
        PlacementError, match=r"layers.0:block: tensors \[\[8, 4\].*S\(0\)@tp.*tp=3"
    ):
        compiled(cut, mesh=Mesh.of(tp=3))
    assert compiled(cut, mesh=Mesh.of(tp=3), rows=9).cost_s > 0
    assert compiled(cut, mesh=Mesh.of(tp=3), rows=None).cost_s > 0  # it is found out when it runs


def test_shapes_have_to_be_known_for_a_bucket() -> None:
    makes = declared(outputs=as_batch())
    with pytest.raises(
        PlacementError, match=r"layers.0:block: the shape .* declare @module\(meta="
    ):
        compiled(makes, mesh=Mesh.of(tp=2))
    two = declared(inputs={"x": as_batch()}, outputs=as_batch(), meta=lambda params, x: x[:, :2])
    assert compiled(two, mesh=Mesh.of(tp=2)).calls[0].outputs[0].kind.shape == (8, 2)
    pair = module(
        inputs={"x": as_batch()}, outputs=(as_batch(), as_batch()), meta=lambda params, x: (x,)
    )(lambda params, x: (x, x))
    with pytest.raises(PlacementError, match="meta gives 1 tensors for 2 outputs"):
        compiled(pair, mesh=Mesh.of(tp=2))


@pytest.mark.parametrize("lies", [layout(dp=Shard(1)), layout(dp=Partial()), layout(pp=Shard(0))])
def test_a_batch_is_cut_along_its_rows_alone(lies: Any) -> None:
    with pytest.raises(PlacementError, match=r"a batch lies .*, expected Shard\(0\)"):
        compiled(WHOLE, mesh=Mesh.of(dp=2, pp=1), batch=lies)


def test_what_has_no_row_for_each_token_is_not_sent_between_stages() -> None:
    pooled = declared(inputs={"x": REPLICATED}, meta=lambda params, x: x[:1])
    with pytest.raises(PlacementError, match=r"layers.0:block gives a value \[1, 4\].*8 tokens"):
        compiled(pooled, declared(inputs={"x": REPLICATED}), mesh=Mesh.of(pp=2))


def test_what_is_routed_comes_in_whole_and_goes_out_in_summands() -> None:
    lies: dict[str, Any] = {"params": {"w": layout(ep=Shard(0))}, "indices": {"x": "w"}}
    whole = tokens(ep=Replicate())
    routed = declared(inputs={"x": whole}, outputs=whole, routed="x", **lies)
    with pytest.raises(PlacementError, match=r"x is routed along ep.*Partial outputs"):
        compiled(routed, mesh=Mesh.of(ep=2))


def test_a_rank_that_waits_for_nothing_is_told() -> None:
    _, second = ThreadGroups.of(Mesh.of(pp=2), timeout_s=0.05)
    with pytest.raises(Empty):
        second.receive(torch.empty(1), axis="pp")


@pytest.mark.parametrize("mesh", ["", "tp=4", "ep=4", "dp=2,ep=2", "pp=3,tp=2"])
def test_programs_are_straight_line_code(mesh: str) -> None:
    axes = Mesh(tuple((a, int(n)) for a, _, n in (p.partition("=") for p in mesh.split(",")) if n))
    batch = layout(**{axis: Shard(0) for axis, _ in axes.axes if axis in ("dp", "ep")})
    bucket = Bucket(tokens=16, rows=16)
    config = models.find_config("deepseek-v2-lite")
    program = models.compile_config(config, axes, bucket=bucket, batch=batch)
    (step,) = ast.parse(program.source).body
    assert isinstance(step, ast.FunctionDef)
    assert all(isinstance(line, STATEMENTS) for line in step.body)
    loops = (ast.comprehension, ast.Lambda, ast.IfExp)
    assert not any(isinstance(node, loops) for node in ast.walk(step))


# --- models written wrongly ----------------------------------------------------------------------

BLOCK = declared(inputs={"x": tokens()}, outputs=tokens())
WEIGHT = Parameter((Source("w", (8, 4)),))


def traced(model: Any, **kind: Any) -> Program:
    """A model of batch.x [8, 4] and one layer with a parameter w."""
    bucket = Bucket(tokens=8, fields={"x": torch.empty(8, 4, device="meta")})
    tree = kind.pop("tree", {"layers": [{"w": WEIGHT}], "last": {"w": WEIGHT}})
    given = {"mesh": Mesh.of(tp=2), "bucket": bucket} | kind
    return compile_model(model, tree, 1, **given)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x if x else None,
        lambda x: x > 0,
        lambda x: x == 0,
        lambda x: x != x,  # noqa: PLR0124
        lambda x: x + x,
        lambda x: 2 * x,
        lambda x: x[0],
        len,
        lambda x: x.shape,
        float,
        torch.relu,
        lambda x: torch.cat((x, x)),
    ],
)
@pytest.mark.parametrize("of", ["batch", "module"])
def test_what_depends_on_numbers_belongs_into_a_module(wrong: Any, of: str) -> None:
    def model(params: Any, batch: Any, kv: Any) -> Any:
        value = batch.x if of == "batch" else BLOCK(params["layers"][0], batch.x)
        wrong(value).max()  # of a batch's field, .shape may be another field of it
        return BLOCK(params["last"], value), kv

    told = "batch.x" if of == "batch" else r"v1, which layers.0:block gives"
    with pytest.raises(PlacementError, match=f"of {told}.*in the body of a @module"):
        traced(model)


def called(*arguments: Any, of: Any = BLOCK, at: Any = None, **named: Any) -> Any:
    """A model that calls a module on its layer's parameters, then on these arguments."""

    def model(params: Any, batch: Any, kv: Any) -> Any:
        branch = params["layers"][0] if at is None else at(params, batch, kv)
        return of(branch, *(a(params, batch, kv) if callable(a) else a for a in arguments)), kv

    return lambda: traced(model, **named)


def x_of(params: Any, batch: Any, kv: Any) -> Any:
    return batch.x


def more(function: Any, **how: Any) -> Any:
    return module(**({"inputs": {"x": tokens()}, "outputs": tokens()} | how))(function)


def two(params: Any, x: Any, y: Any) -> Any:
    return x


LEFT = []


def leaving(params: Any, batch: Any, kv: Any) -> Any:
    LEFT.append(BLOCK(params["layers"][0], batch.x))
    return LEFT[-1], kv


def from_elsewhere() -> Any:
    traced(leaving)
    return called(lambda *_: LEFT[-1])()


CUT = layout(tp=Shard(0))
WRONG: dict[str, tuple[Any, str]] = {
    "a key that is not there": (
        called(x_of, at=lambda p, b, k: p["nope"]),
        r"params has no 'nope'; it has layers, last",
    ),
    "a layer that is not there": (
        called(x_of, at=lambda p, b, k: p["layers"][3]),
        r"params\['layers'\] has no 3; it has 0",
    ),
    "the KV of a layer that is not there": (
        called(x_of, lambda p, b, k: k[5], of=more(two)),
        "kv has no 5; it has 0",
    ),
    "too few arguments": (called(), "block: missing a required argument: 'x'; it takes params, x"),
    "a list of values": (
        called(lambda p, b, k: [b.x], of=more(lambda params, x: x, inputs={})),
        "argument x is of type list, expected .*one by one",
    ),
    "a tensor": (called(x_of, torch.ones(2), of=more(two)), "y is of type Tensor.*Constant leaves"),
    "a value of another model": (from_elsewhere, "v1, which layers.0:block gives in another model"),
    "logits alone": (lambda: traced(lambda p, b, k: BLOCK(p["last"], b.x)), "not v1, which last:"),
    "nothing": (lambda: traced(lambda p, b, k: None), "not NoneType"),
    "the batch": (lambda: traced(lambda p, b, k: (b.x, k)), r"not \(batch.x, kv\)"),
    "a tree of tensors": (
        called(x_of, tree={"layers": [{"w": torch.ones(2)}]}),
        "layers.0.w is of type Tensor; the leaves",
    ),
    "a name that the tree has not": (
        called(x_of, of=declared(inputs={"x": tokens()}, params={"wieght": CUT})),
        r"@module places wieght, which params\['layers'\]\[0\] has not, and does not place w",
    ),
    "placements without a tree": (
        called(x_of, of=declared(inputs={"x": tokens()}, params={"w": CUT}), at=x_of),
        "its first argument is no branch of params",
    ),
    "rows of a parameter that the tree has not": (
        called(x_of, of=declared(inputs={"x": tokens()}, indices={"x": "rows"})),
        r"indices count rows of rows, but params\['layers'\]\[0\] has w",
    ),
    "a dim that a parameter has not": (
        called(x_of, of=declared(inputs={"x": tokens()}, params={"w": layout(tp=Shard(2))})),
        r"layers.0.w \(w \[8, 4\]\): S\(2\)@tp shards dim 2, but there are 2 dims",
    ),
    "a parameter that is cut elsewhere": (
        called(
            lambda p, b, k: declared(inputs={"x": tokens()}, params={"w": CUT})(p["last"], b.x),
            lambda p, b, k: p["last"]["w"],
            of=more(two),
        ),
        r"layers.0:two: parameter last.w is placed R here and S\(0\)@tp by another module",
    ),
    "a rule that fails": (
        called(x_of, of=more(lambda params, x: x, meta=lambda params, x: params["v"])),
        r"its meta failed with KeyError\('v'\)",
    ),
    "a rule that gives a number": (
        called(x_of, of=more(lambda params, x: x, meta=lambda params, x: 3)),
        "meta gives 3, expected a meta tensor",
    ),
    "a batch of no layout": (called(x_of, batch=tokens()), "a batch lies tokens, expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_model_that_cannot_be_traced_is_told_why(name: str) -> None:
    attempt, reason = WRONG[name]
    with pytest.raises(PlacementError, match=reason):
        attempt()


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (lambda: layout(tp=0), r"axis tp: got 0; expected Shard\(dim\)"),
        (lambda: tokens(tp="Shard(0)"), "axis tp: got 'Shard"),
        (lambda: layout(tp=Shard(-1)), r"axis tp: got S\(-1\); dims count from 0"),
        (lambda: declared(inputs={"x": Shard(0)}), r"as a placement; expected layout\(...\)"),
        (lambda: declared(outputs=Shard(0)), r"as a placement; expected layout\(...\)"),
        (lambda: declared(inputs=[tokens()]), "block: inputs is .*, expected a mapping by name"),
        (lambda: declared(params={"w": tokens()}), "parameter w is placed tokens, expected layout"),
        (lambda: declared(params={"w": layout(tp=Partial())}), "w is placed P@tp.*never in summ"),
        (lambda: declared(indices={"x": "w"}), "x counts rows of w but has no placement"),
        (lambda: more(lambda *x: x), r"its argument \*x is variadic positional"),
        (lambda: more(lambda params, x, **y: x), r"its argument \*\*y is variadic keyword"),
        (lambda: BLOCK({}, torch.ones(1)), "block was called outside a trace"),
    ],
)
def test_declarations_that_make_no_sense_are_refused(attempt: Any, reason: str) -> None:
    with pytest.raises(PlacementError, match=reason):
        attempt()


@pytest.mark.parametrize(
    "counts", [{"tokens": 0}, {"tokens": -1}, {"rows": 0}, {"tokens": 1 << 40}]
)
def test_a_step_has_tokens(counts: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"got .*; expected 1 to 2,147,483,648 in a step"):
        Bucket(**counts)


class Step:
    """A batch of one field, and its own KV."""

    x = torch.arange(32.0).reshape(8, 4)

    def donate(self) -> Step:
        return self


@pytest.mark.parametrize(
    "name", ["kv", "batch", "v1", "v2", "float", "lambda", "all_reduce_tp", "<a>"]
)
def test_a_module_may_have_any_name_and_any_number(name: str) -> None:
    def body(params: Any, x: Any, y: Any) -> Any:
        return x * params["w"].sum() + (0 if y is None else y)

    body.__name__ = name
    named = more(body)

    def model(params: Any, batch: Any, kv: Any) -> Any:
        x = named(params["layers"][0], batch.x, None)
        return named(params["last"], x, float("-inf")), kv

    program = traced(model, mesh=Mesh.single())
    ones = {"w": torch.ones(8, 4)}
    logits, _ = program({"layers": [ones], "last": ones}, Step(), Step())
    assert torch.equal(logits, torch.full((8, 4), float("-inf")))


def test_a_branch_is_walked_as_what_it_is_in_python() -> None:
    def model(params: Any, batch: Any, kv: Any) -> Any:
        assert ("w" in params["last"], "v" in params["last"]) == (True, False)
        assert (list(params), len(params["layers"])) == (["layers", "last"], 1)
        value = batch.x
        for layer in params["layers"]:
            value = BLOCK(layer, value)
        return BLOCK(params["layers"][-1], value), kv

    assert traced(model).held_params == {("layers", 0, "w")}


def test_rows_are_counted_for_each_table_alone() -> None:
    """Two tables of 8 and of 4 rows, both from row 0 on, looked up by the same numbers."""

    def body(params: Any, ids: Tensor) -> Tensor:
        own = torch.where((ids >= 0)[:, None], params["w"][ids.clamp(min=0)], 0.0)
        return own.sum(1)

    look_up = more(body, inputs={"ids": tokens(tp=Replicate())}, outputs=tokens(tp=Partial()),
                   params={"w": CUT}, indices={"ids": "w"},
                   meta=lambda params, ids: torch.empty(8, device="meta"))  # fmt: skip

    @module(inputs={"a": tokens(), "b": tokens()}, outputs=tokens())
    def add(params: Any, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def model(params: Any, batch: Any, kv: Any) -> Any:
        both = (look_up(params[name], batch.x) for name in ("wide", "narrow"))
        return add(params["none"], *both), kv

    ids = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    tables = {"wide": torch.arange(8.0)[:, None], "narrow": 100 * torch.arange(4.0)[:, None]}
    tree = {name: {"w": Parameter((Source(name, tuple(t.shape)),))} for name, t in tables.items()}
    bucket = Bucket(tokens=8, fields={"x": ids.to("meta")})

    def work(communicator: ThreadGroups) -> Tensor:
        mesh = communicator.mesh
        program = compile_model(
            model, tree | {"none": {}}, 0, mesh=mesh, communicator=communicator, bucket=bucket
        )
        at = mesh.coordinate("tp")
        own = {name: {"w": table.chunk(2)[at]} for name, table in tables.items()}
        logits, _ = program(own | {"none": {}}, Given(ids), Step())
        return logits

    with ThreadPoolExecutor(2) as threads:
        for logits in threads.map(work, ThreadGroups.of(Mesh.of(tp=2))):
            assert torch.equal(logits, 101.0 * ids)


class Given:
    """A batch of one field."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
