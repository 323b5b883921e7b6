"""`with own_random(seed):` draws what `torch.manual_seed(seed)` would have drawn, and no other thread notices."""

from __future__ import annotations

import asyncio
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from interrupting import Interrupting
from torch import distributions, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import random_split

from accelerate_tts import (
    InferenceContextError,
    SettingsError,
    carry_mode,
    inference,
    optimized_model,
    own_random,
    receipt_of,
    set_active,
)
from accelerate_tts.events import Lasting
from accelerate_tts.patching.change import Counter
from accelerate_tts.runtime.own_random import OwnRandom, opened, outside
from accelerate_tts.runtime.random_functions import draws_in
from accelerate_tts.runtime.rng import random_states
from accelerate_tts.runtime.seeding import seeded
from accelerate_tts.stages.compile.inductor import compile_function, options

if TYPE_CHECKING:
    from torch import Tensor


def vmapped(function: Callable[[Tensor], Tensor], randomness: str) -> Tensor:
    made: Tensor = torch.func.vmap(function, randomness=randomness)(torch.ones(4, 3))
    return made


def is_known(draw: Callable[[Any], Tensor]) -> bool:
    """Check that this release of torch draws into nested tensors so: 2.6 knows fewer functions."""
    try:
        draw(JAGGED)
    except NotImplementedError:
        return False
    return True


CHANCES = torch.arange(1.0, 16.0).reshape(3, 5).softmax(-1)
ACROSS = torch.ones(6, 4).T  # its memory is in another order than its elements
PIECES = [torch.ones(3, 4), torch.ones(5, 4)]
JAGGED = torch.nested.nested_tensor(PIECES, layout=torch.jagged)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    NESTED = torch.nested.nested_tensor(PIECES)
DRAWS: dict[str, Callable[[], Tensor]] = {
    "multinomial": lambda: torch.multinomial(CHANCES, 2),
    "multinomial, a method": lambda: CHANCES.multinomial(1),
    "randn": lambda: torch.randn(3, 4),
    "rand": lambda: torch.rand((2, 3), dtype=torch.float64),
    "randn, into": lambda: torch.randn(3, out=torch.empty(3)),
    "randn_like": lambda: torch.randn_like(ACROSS),
    **{
        f"{name}, nested": lambda draw=draw: torch.cat([each.flatten() for each in draw(JAGGED).unbind()])
        for name, draw in {
            "randn_like": torch.randn_like,
            "rand_like": torch.rand_like,
            "randint_like": lambda x: torch.randint_like(x, 3, 90),
            "dropout": functional.dropout,
            "dropout in bf16": lambda x: functional.dropout(x.bfloat16(), 0.3),
            "randn_like of float64": lambda x: torch.randn_like(x, dtype=torch.float64),
            "randn_like of what is turned": lambda x: torch.randn_like(x.transpose(1, 2)),
        }.items()
        if is_known(draw)
    },
    "randn_like, nested, strided": lambda: torch.cat([each.flatten() for each in torch.randn_like(NESTED).unbind()]),
    "dropout, nested, strided": lambda: torch.cat([each.flatten() for each in functional.dropout(NESTED).unbind()]),
    "randn_like, complex": lambda: torch.randn_like(CHANCES, dtype=torch.complex64),
    "rand_like": lambda: torch.rand_like(ACROSS, dtype=torch.bfloat16, requires_grad=True).detach(),
    "randint_like": lambda: torch.randint_like(ACROSS, 7),
    "randint_like, from": lambda: torch.randint_like(ACROSS, 3, 9),
    "randint_like, by name": lambda: torch.randint_like(ACROSS, low=2, high=5),
    "randint": lambda: torch.randint(5, (9,)),
    "randperm": lambda: torch.randperm(20),
    "normal": lambda: torch.normal(0.0, 1.0, (3,)),
    "normal, of tensors": lambda: torch.normal(CHANCES, CHANCES),
    "bernoulli": lambda: torch.bernoulli(CHANCES),
    "bernoulli, a method": lambda: CHANCES.bernoulli(),
    "poisson": lambda: torch.poisson(9 * CHANCES),
    "binomial": lambda: torch.binomial(torch.full((3, 5), 9.0), CHANCES),
    "exponential_": lambda: torch.empty(4).exponential_(),
    "cauchy_": lambda: torch.empty(4).cauchy_(),
    "geometric_": lambda: torch.empty(4).geometric_(0.3),
    "log_normal_": lambda: torch.empty(4).log_normal_(),
    "random_": lambda: torch.empty(4).random_(0, 900),
    "uniform_": lambda: torch.empty(4).uniform_(),
    "bernoulli_": lambda: torch.empty(40).bernoulli_(0.4),
    "dropout": lambda: functional.dropout(ACROSS, 0.3),
    "dropout, a layer": lambda: nn.Dropout(0.4)(ACROSS),
    "dropout, in place": lambda: functional.dropout(ACROSS.clone(), 0.3, inplace=True),
    "dropout, of torch": lambda: torch.dropout(ACROSS, 0.5, train=True),
    "dropout of channels": lambda: functional.dropout1d(ACROSS[None], 0.4),
    "dropout of channels, no batch": lambda: functional.dropout1d(ACROSS, 0.4),
    "dropout of channels, a layer": lambda: nn.Dropout2d(0.4)(torch.ones(2, 8, 2, 2)),
    "dropout of channels, in place": lambda: functional.dropout3d(torch.ones(8, 2, 2, 2), 0.4, inplace=True),
    "alpha dropout": lambda: functional.alpha_dropout(ACROSS, 0.4, training=True),
    "alpha dropout, in place": lambda: functional.alpha_dropout(ACROSS.clone(), 0.4, training=True, inplace=True),
    "alpha dropout of channels": lambda: functional.feature_alpha_dropout(ACROSS, 0.4, training=True),
    "rrelu": lambda: functional.rrelu(-ACROSS, training=True),
    "rrelu, in place": lambda: functional.rrelu(-ACROSS, 0.1, 0.4, training=True, inplace=True),
    "rrelu, of torch": lambda: torch.rrelu(-ACROSS, training=True),
    "the process's generator by name": lambda: torch.randn(3, generator=torch.default_generator),
    "the process's generator by place": lambda: torch.poisson(9 * CHANCES, torch.default_generator),
    "a library's default": lambda: torch.tensor(random_split(range(9), [4, 5])[0].indices),  # type: ignore[arg-type]
    "a size that is a tensor": lambda: torch.randn(torch.tensor(3), 2),  # type: ignore[call-overload]
    "vmap": lambda: vmapped(lambda x: x + torch.randn_like(x), "different"),
    "vmap, the same": lambda: vmapped(lambda x: x + torch.randint_like(x, 9), "same"),
    "vmap, of no input": lambda: vmapped(lambda x: x + torch.rand_like(torch.ones(3)), "different"),
    "vmap, dropout": lambda: vmapped(lambda x: x + functional.dropout(torch.ones(3), 0.4), "different"),
    "gumbel_softmax": lambda: functional.gumbel_softmax(CHANCES, tau=0.7),
    "gumbel_softmax, hard": lambda: functional.gumbel_softmax(CHANCES, hard=True, dim=0),
    "Categorical": lambda: distributions.Categorical(CHANCES).sample((2,)),
    "Normal": lambda: distributions.Normal(0.0, 1.0).sample((3,)),
    "Gamma": lambda: distributions.Gamma(2.0, 1.0).sample((3,)),
    "Dirichlet": lambda: distributions.Dirichlet(CHANCES).sample(),
    "Uniform": lambda: distributions.Uniform(0.0, 1.0).sample((3,)),
    "a layer's weights": lambda: nn.Linear(3, 3).weight.detach(),
    "init.normal_": lambda: nn.init.normal_(torch.empty(3)),
    "an operator": lambda: torch.ops.aten.randn.default([3]),
    "an operator of any kind": lambda: torch.ops.aten.bernoulli(CHANCES, p=0.4),
    "an operator, like": lambda: torch.ops.aten.randn_like.default(ACROSS),
    "an operator in place": lambda: torch.ops.aten.normal_.default(torch.empty(3), 1.0, 2.0),
    "an operator of dropout": lambda: torch.ops.aten.dropout.default(ACROSS, 0.4, True),
    "an operator with sizes": lambda: torch.ops.aten.randint.low(3, 9, [5], dtype=torch.int64),
    "init.trunc_normal_": lambda: nn.init.trunc_normal_(torch.empty(30)),
}
QUIET: dict[str, Callable[[], Tensor]] = {
    "dropout outside training": lambda: functional.dropout(ACROSS, 0.3, training=False),
    "dropout of nothing": lambda: functional.dropout(ACROSS, 0.0),
    "alpha dropout outside training": lambda: functional.alpha_dropout(ACROSS, 0.3),
    "rrelu outside training": lambda: functional.rrelu(-ACROSS),
    "rrelu with a generator": lambda: torch.rrelu(-ACROSS, training=True, generator=torch.Generator().manual_seed(7)),
    "a generator of its own": lambda: torch.randn(3, generator=torch.Generator().manual_seed(7)),
    "an operator with one": lambda: torch.ops.aten.randn.generator([3], generator=torch.Generator().manual_seed(7)),
    "an operator of dropout outside training": lambda: torch.ops.aten.dropout.default(ACROSS, 0.4, False),
    "one by place": lambda: torch.poisson(9 * CHANCES, torch.Generator().manual_seed(7)),
    "like, with one": lambda: torch.empty_like(ACROSS).normal_(generator=torch.Generator().manual_seed(7)),
}  # fmt: skip


@pytest.mark.parametrize("draw", [*DRAWS.values(), *QUIET.values()], ids=[*DRAWS, *QUIET])
def test_what_is_drawn(draw: Callable[[], Tensor]) -> None:
    expected = [draw_twice(draw, 3), draw_twice(draw, -4)]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    for seed, (first, second) in zip((3, -4), expected, strict=True):
        with own_random(seed):
            assert torch.equal(draw(), first)
            assert torch.equal(draw(), second)
    assert torch.equal(torch.get_rng_state(), before), "the process's generator is not drawn from"


def draw_twice(draw: Callable[[], Tensor], seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return draw(), draw()


def test_an_exported_program_draws_from_the_block() -> None:
    """Its graph calls operators, not torch's functions."""

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            noise: Tensor = torch.randn_like(x) + torch.rand(6) + functional.dropout(x, 0.3)
            return noise + torch.zeros_like(x).uniform_()

    exported = torch.export.export(Noisy(), (ACROSS,)).module()
    (expected, _), again = draw_twice(lambda: exported(ACROSS), 5), torch.get_rng_state()
    with own_random(5):
        assert torch.equal(exported(ACROSS), expected)
    assert torch.equal(torch.get_rng_state(), again)


def test_dropout_of_everything_and_of_no_tensor_are_torchs_own() -> None:
    with own_random(1):
        assert torch.equal(functional.dropout(ACROSS, 1.0), torch.zeros_like(ACROSS))
        with pytest.raises(ValueError, match="probability"):
            functional.dropout(ACROSS, 2.0)
        with pytest.raises(TypeError):
            torch.multinomial()  # type: ignore[call-overload]


def test_what_takes_no_generator_says_so_once(seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate_tts.runtime.random_functions.said", Lasting())
    q = torch.ones(1, 2, 4, 8)
    layers = nn.LSTM(4, 4, 2, dropout=0.5), nn.GRU(4, 4, 2, dropout=0.5)
    for _ in range(2):
        with own_random(1):
            functional.scaled_dot_product_attention(q, q, q)
            layers[0].eval()(torch.ones(3, 1, 4))
            functional.scaled_dot_product_attention(q, q, q, dropout_p=0.2)
            layers[1].train()(nn.utils.rnn.pack_sequence([torch.ones(3, 4)]))
    assert [event.reason for event in seen] == [
        f"{name} takes no generator, and draws from the process's" for name in ("scaled_dot_product_attention", "gru")
    ]


def test_what_is_to_be_drawn_again_in_a_backward_pass_says_so_once(
    seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate_tts.runtime.own_random.said", Lasting())
    x = torch.ones(9, requires_grad=True)
    with own_random(1):
        functional.dropout(x).sum().backward()
    assert not seen
    for reentrant in (True, False):
        monkeypatch.setattr("accelerate_tts.runtime.own_random.said", Lasting())
        with own_random(1):
            again: Any = checkpoint(functional.dropout, x, use_reentrant=reentrant)
            again.sum().backward()
            functional.dropout(again)
    assert ["torch.utils.checkpoint" in event.reason for event in seen] == [True, True]


def test_what_torch_does_not_draw_into_nested_tensors_is_its_error() -> None:
    for draw in (functional.alpha_dropout, functional.dropout2d, functional.gumbel_softmax):
        with pytest.raises((NotImplementedError, RuntimeError)) as plain:
            draw(JAGGED, **({} if draw is functional.gumbel_softmax else {"training": True}))
        with own_random(1), pytest.raises(plain.type):
            draw(JAGGED, **({} if draw is functional.gumbel_softmax else {"training": True}))


def test_wrong_dropout_of_channels_is_torchs_error() -> None:
    with own_random(1), pytest.raises(RuntimeError, match="dropout1d: Expected 2D or 3D input"):
        functional.dropout1d(torch.ones(1, 2, 3, 4))


def test_recorders_are_not_given_a_generator_of_the_block() -> None:
    """A graph lives on. With it, each call outside would go on with the numbers of a block that has ended."""

    def noisy(x: Tensor) -> Tensor:
        return x + torch.randn_like(x) + functional.dropout(x, 0.5)

    with own_random(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(noisy, torch.ones(3), check_trace=False)
        graph = torch.fx.symbolic_trace(noisy)
    for run in (traced, graph):
        torch.manual_seed(4)
        expected = noisy(torch.ones(3))
        torch.manual_seed(4)
        assert torch.equal(run(torch.ones(3)), expected)


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_the_generator_of_a_device_by_name_is_the_processs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in: a generator of the CPU that says that it is the device's."""
    default = type("OfDevice", (torch.Generator,), {"device": torch.device(device, 0)})()
    other = type("OfDevice", (torch.Generator,), {"device": torch.device(device, 0)})()
    monkeypatch.setattr(getattr(torch, device), "default_generators", (default,))
    with own_random(1):
        expected = torch.randn(3)
    with own_random(1):
        assert torch.equal(torch.randn(3, generator=default), expected)
        assert not torch.equal(torch.randn(3, generator=other.manual_seed(8)), expected), "it is the caller's own"


def test_tensors_without_memory_draw_nothing() -> None:
    with own_random(1):
        assert torch.randn(3, device="meta").shape == (3,)
        torch.nn.Linear(2, 2, device="meta")
    with own_random(1), torch.device("meta"):
        assert torch.randn(3).device.type == "meta"
        assert torch.randn_like(torch.empty(3)).device.type == "meta"


@given(st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.sampled_from(list(DRAWS))), max_size=12))
def test_blocks_in_any_order_of_nesting(steps: list[tuple[int, str]]) -> None:
    """Each object draws on where it is the innermost one; entering it again begins anew."""
    alone = [own_random(seed) for seed in (0, 1, 2)]
    for seed, name in steps:
        torch.manual_seed(seed)
        expected = DRAWS[name]()
        with alone[(seed + 1) % 3], alone[seed], alone[seed]:
            assert torch.equal(DRAWS[name](), expected)


@pytest.mark.parametrize("seed", [np.int64(5), 2**64 - 1, -(2**63), 0, True.__index__()])
def test_seeds(seed: Any) -> None:
    torch.manual_seed(int(seed))
    expected = torch.randn(3)
    with own_random(seed):
        assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("seed", [None, "7", 1.5, 2**64, -(2**63) - 1, True, [1]])
def test_what_is_no_seed(seed: Any) -> None:
    with pytest.raises(SettingsError, match=r"own_random\(.*\): a seed must be an integer"):
        own_random(seed)


def test_it_is_no_optimisation_and_stays_when_switched_off() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    set_active(False)
    with own_random(5):
        assert torch.equal(torch.randn(3), expected)
    set_active(True)


def drawn_in_steps(count: int) -> Iterator[Tensor]:
    for _ in range(count):
        yield torch.randn(2)


async def drawn_in_a_task() -> Tensor:
    first = torch.randn(2)
    await asyncio.sleep(0)
    return torch.cat([first, torch.randn(2)])


async def drawn_asynchronously(count: int) -> AsyncIterator[Tensor]:
    for _ in range(count):
        await asyncio.sleep(0)
        yield torch.randn(2)


def seeded_body(function: Callable[..., Any], seed: int, *args: Any) -> Any:
    with own_random(seed):
        return carry_mode(function)(*args)


@pytest.fixture
def expected() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    ones = torch.cat([torch.randn(2) for _ in range(2)])
    torch.manual_seed(2)
    return ones, torch.cat([torch.randn(2) for _ in range(2)])


def test_threads_inherit_nothing_and_carry_mode_carries(expected: tuple[Tensor, Tensor]) -> None:
    def draw() -> Tensor:
        return torch.cat([torch.randn(2), torch.randn(2)])

    torch.manual_seed(2)
    with ThreadPoolExecutor(1) as pool, own_random(1):
        plain, carried = pool.submit(draw).result(), pool.submit(carry_mode(draw)).result()
        assert not pool.submit(torch.is_inference_mode_enabled).result()
    assert torch.equal(plain, expected[1])
    assert torch.equal(carried, expected[0])
    with own_random(1), torch.inference_mode():
        inside = carry_mode(lambda: (draw(), torch.is_inference_mode_enabled()))
    found, mode = inside()
    assert mode
    assert torch.equal(found, expected[0])


def test_generators_in_turn(expected: tuple[Tensor, Tensor]) -> None:
    one, other = seeded_body(drawn_in_steps, 1, 2), seeded_body(drawn_in_steps, 2, 2)
    pieces = [(next(one), next(other)) for _ in range(2)]
    assert torch.equal(torch.cat([piece for piece, _ in pieces]), expected[0])
    assert torch.equal(torch.cat([piece for _, piece in pieces]), expected[1])
    one.close()


def test_tasks_in_turn(expected: tuple[Tensor, Tensor]) -> None:
    async def collected(seed: int) -> Tensor:
        return torch.cat([piece async for piece in seeded_body(drawn_asynchronously, seed, 2)])

    async def both() -> list[Tensor]:
        return list(await asyncio.gather(
            seeded_body(drawn_in_a_task, 1), collected(2), seeded_body(drawn_in_a_task, 2), collected(1)
        ))  # fmt: skip

    found = asyncio.run(both())
    for got, wanted in zip(found, [*expected, *expected[::-1]], strict=True):
        assert torch.equal(got, wanted)


def test_it_is_refused_where_it_would_leak() -> None:
    def steps() -> Iterator[None]:
        with own_random(1):
            yield

    async def task() -> None:
        with own_random(1):
            await asyncio.sleep(0)

    async def scope() -> None:
        async with own_random(1):
            pass

    for run in (lambda: next(steps()), lambda: asyncio.run(task()), lambda: asyncio.run(scope())):
        with pytest.raises(InferenceContextError, match=r"carry_mode\(function\)"):
            run()
    assert torch._C._len_torch_function_stack() == 0  # type: ignore[attr-defined]


class Noisy(nn.Module):
    """A model that draws within what is tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x + torch.randn_like(x))


class NoisyBackend:
    @optimized_model(warmup=lambda backend: backend.speak(torch.ones(2, 64)), tune_seconds=10.0)
    def load(self) -> None:
        torch.manual_seed(0)
        self.model = Noisy().eval()

    @inference
    def speak(self, x: Tensor) -> Tensor:
        made: Tensor = self.model(x)
        return made


def test_loading_inside_a_block_draws_nothing_from_it() -> None:
    backend = NoisyBackend()
    with own_random(8):
        first = torch.randn(3)
        backend.load()
        then = torch.randn(3)
    assert receipt_of(backend) is not None
    torch.manual_seed(8)
    assert torch.equal(first, torch.randn(3))
    with own_random(8):
        assert torch.equal(torch.randn(3), first)
        untouched = Noisy()
        assert torch.equal(torch.randn(3), then), "the load function's own draws, and no others"
        del untouched


def test_seeded_scopes_are_outside_and_states_go_back() -> None:
    with own_random(3):
        before = torch.randn(2)
        with seeded("cpu", 11):
            inside = torch.randn(2)
        put_back = random_states(())
        following = torch.randn(2), torch.rand(3)
        put_back()
        assert torch.equal(torch.randn(2), following[0]), "a call that is made again draws the same"
        assert torch.equal(torch.rand(3), following[1])
    torch.manual_seed(11)
    assert torch.equal(inside, torch.randn(2))
    torch.manual_seed(3)
    assert torch.equal(before, torch.randn(2))
    with own_random(3):
        put_back = random_states(())  # nothing was drawn yet
        first = torch.randn(2)
        put_back()
        assert torch.equal(torch.randn(2), first)


def test_seeded_scopes_are_outside_of_blocks_below_other_modes() -> None:
    """A window inside must neither go on with the block's numbers nor leave its own seed to it."""
    torch.manual_seed(11)
    inside = torch.randn(2)
    torch.manual_seed(5)
    expected = torch.randn(2)

    def device() -> Any:
        return torch.device("cpu")

    for enter in (device, lambda: own_random(5), nullcontext):
        with own_random(5), enter():
            with seeded("cpu", 11):
                if enter is not device:  # which torch itself leaves on the stack then
                    torch.set_default_device("cpu")  # a model's load may do so, which puts a mode below all others
                assert torch.equal(torch.randn(2), inside)
            assert torch.equal(torch.randn(2), expected)
        torch.set_default_device(None)
    assert torch._C._len_torch_function_stack() == 0  # type: ignore[attr-defined]
    with own_random(5):
        mode = opened()
        assert mode is not None
        before = mode.states()
        mode.seed(11)
        mode.put_back(before)
        assert torch.equal(torch.randn(2), expected), "a block without a draw yet begins at its own seed"


def in_steps() -> Iterator[Tensor]:
    for _ in range(2):
        yield torch.randn(2)


def all_that_enters() -> None:
    with own_random(1):
        functional.dropout(torch.ones(3), 0.5)
        with outside():
            pass
        with own_random(2), outside():
            pass
        with torch.device("cpu"), outside():
            pass
        carry_mode(torch.randn)(2)
        list(carry_mode(in_steps)())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has other instructions for a call")
def test_ctrl_c_anywhere_leaves_no_mode() -> None:
    def interrupted(place: tuple[Any, int] | None) -> Interrupting:
        tracer, before = Interrupting(place), sys.gettrace()
        sys.settrace(tracer)
        try:
            all_that_enters()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        return tracer

    for place in interrupted(None).places:
        tracer = interrupted((place, 1))
        left = torch._C._len_torch_function_stack()  # type: ignore[attr-defined]
        for _ in range(left):
            torch._C._pop_torch_function_stack()  # type: ignore[attr-defined]
        assert not left, tracer.where


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    run = compile_function(function, "default", Counter("test"))

    def call(*args: Any) -> Any:
        with options(None):
            return run(*args)

    return call


def test_compiled_functions() -> None:
    def plainly(x: Tensor) -> Tensor:
        return x.sin() + torch.randn_like(x) + functional.dropout(x, 0.5)

    noisy = compiled(plainly)
    quiet = compiled(lambda x: functional.dropout(x.sin(), 0.5, training=False) * 2)
    x = torch.linspace(0.0, 1.0, 8)
    noisy(x)
    plain = quiet(x)
    torch.manual_seed(6)
    expected = plainly(x)
    torch.manual_seed(1)
    with own_random(6):
        assert torch.allclose(noisy(x), expected), "its graph would draw from the process's generator"
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(quiet(x), plain), "the graph that it has serves inside a block, too"


def test_a_graph_that_is_compiled_inside_a_block() -> None:
    run = compiled(lambda x, noisy: x + torch.randn_like(x) if noisy else x * 2)
    run(torch.zeros(8), False)  # a graph that draws nothing, so the function counts as one that does not
    torch.manual_seed(6)
    expected = torch.randn(8), torch.randn(8)
    before = torch.get_rng_state()
    with own_random(6):
        assert torch.equal(run(torch.zeros(8), True), expected[0]), "at the call that compiles it"
        assert torch.equal(run(torch.zeros(8), True), expected[1])
    assert torch.equal(torch.get_rng_state(), before)
    first = run(torch.zeros(8), True)
    torch.set_rng_state(before)
    assert torch.equal(first, torch.randn(8)), "outside, it is compiled, and draws the process's numbers"


@torch._dynamo.disable
def left_out(x: Tensor) -> Tensor:
    return torch.randn_like(x)


@pytest.mark.parametrize("forward", [
    lambda layer, x: layer(torch.tanh(x) + left_out(x)), lambda layer, x: left_out(layer(x)),
    lambda layer, x: layer(left_out(x)), lambda layer, x: layer(x) + torch.empty(3).normal_() if x.sum() > 0 else x,
], ids=["between graphs", "behind one", "before one", "behind a decision"])  # fmt: skip
def test_draws_beside_the_graphs_of_a_part(
    forward: Callable[..., Tensor], seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """dynamo leaves a function out: it is called between graphs, where no mode was."""
    monkeypatch.setattr("accelerate_tts.stages.compile.inductor.said", Lasting())
    layer, x = nn.Linear(3, 3), torch.ones(2, 3)
    run = compiled(lambda x: forward(layer, x))
    torch.manual_seed(6)
    expected = forward(layer, x)
    before = torch.get_rng_state()
    with own_random(6):
        run(x)
    if not torch.equal(torch.get_rng_state(), before):
        assert [event.reason for event in seen if "between its graphs" in event.reason], "at the call that compiled it"
    before = torch.get_rng_state()
    for _ in range(2):
        with own_random(6):
            assert torch.allclose(run(x), expected, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), before)
    assert len([event for event in seen if "between its graphs" in event.reason]) <= 1


def test_which_graphs_draw() -> None:
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(x, 0.3, training=self.training)

    def graph_of(function: Callable[..., Any]) -> Any:
        return torch.fx.symbolic_trace(function).graph

    assert not draws_in(graph_of(lambda x: functional.dropout(x, 0.3, training=False) + torch.relu(x)))
    assert not draws_in(graph_of(lambda x: functional.dropout(x, 0.0) + x.abs()))
    assert draws_in(graph_of(lambda x: functional.dropout(x, 0.3)))
    assert draws_in(graph_of(lambda x: x.clone().normal_()))
    assert draws_in(graph_of(lambda x: torch.ops.aten.randn_like.default(x)))
    assert not draws_in(graph_of(lambda x: torch.ops.aten.dropout.default(x, 0.0, True) + torch.ops.aten.abs(x)))
    assert draws_in(graph_of(lambda x: torch.multinomial(x, 1)))
    assert draws_in(graph_of(lambda x: functional.alpha_dropout(x, 0.3, training=True)))
    assert draws_in(graph_of(lambda x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)))
    assert not draws_in(graph_of(lambda x: functional.scaled_dot_product_attention(x, x, x)))
    assert not draws_in(graph_of(lambda x: functional.rrelu(x) + functional.alpha_dropout(x, 0.3)))


def test_the_users_own_compiled_code_runs_inside() -> None:
    run = torch.compile(lambda x: x.sin() * 2 + 1, backend="eager")
    x = torch.ones(3)
    with own_random(1):
        assert torch.equal(run(x), x.sin() * 2 + 1)


def vits() -> Any:
    torch.manual_seed(0)
    config = transformers.VitsConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, flow_size=16,
        spectrogram_bins=9, upsample_initial_channel=32, upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3, 5], resblock_dilation_sizes=[[1, 3], [1, 3]], prior_encoder_num_flows=2,
        duration_predictor_num_flows=2, posterior_encoder_num_wavenet_layers=2, prior_encoder_num_wavenet_layers=2,
        wavenet_dilation_rate=1, num_speakers=1,
    )  # fmt: skip
    return transformers.VitsModel(config).eval()


def test_two_voices_in_threads_are_what_they_are_alone() -> None:
    """Untouched, without any decorator: each thread's draws are its own."""
    model, ids = vits(), torch.arange(1, 20)[None]
    barrier = threading.Barrier(4)

    @torch.inference_mode()
    def speak(seed: int) -> Tensor:
        torch.set_num_threads(1)
        barrier.wait(60)
        with own_random(seed):
            made: Tensor = model(ids).waveform
        return made

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(speak, [1, 2, 1, 2]))
    with torch.inference_mode():
        for seed, wave in zip([1, 2, 1, 2], found, strict=True):
            torch.manual_seed(seed)
            alone = model(ids).waveform
            assert alone.shape == wave.shape
            assert torch.equal(alone, wave)


def test_a_device_without_generators_says_so(seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class NoGenerator:
        def __init__(self, *_: object) -> None:
            raise RuntimeError("no generators here")

    monkeypatch.setattr(torch, "Generator", NoGenerator)
    monkeypatch.setattr("accelerate_tts.runtime.own_random.said", Lasting())
    with OwnRandom(1):
        torch.randn(3)
        torch.rand(3)
    assert [event.reason for event in seen] == ["cpu has no generators but the process's: no generators here"]
