"""Writing down the linear program of a function of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from .._programs.numbers import Numbers
from .._programs.program import Emitter, Program
from .._programs.values import Constant, Var
from .._spaces.space import TensorSpec
from .._torch.modes import NOTHING, subclasses_ignored
from .recorder import Recorder
from .recording import OpaqueError, Recording
from .witness import Witness


def record_function(
    fn: Callable[..., Sequence[torch.Tensor | None]],
    in_specs: Sequence[TensorSpec],
    out_specs: Sequence[TensorSpec | None],
    numbers: Numbers,
    source: str,
    *,
    given: Iterable[Constant] = (),
    witness: Witness | None = None,
) -> tuple[Program, list[torch.Tensor | None]]:
    """Record a linear function written in PyTorch operations by calling it once.

    The tensors that the program reads come into `numbers`; constants that `fn` uses are `given`. A
    `witness` watches the call.

    Returns
    -------
    program, results
        The program, and what `fn` returned.

    Raises
    ------
    OpaqueError
        If `fn` does something that cannot be written down: its result does not descend from
        its arguments, or an operation in it is not linear or reads numbers.
    """
    emitter = Emitter(source, numbers)
    recording = Recording(emitter)
    recording.constants.given(given)
    generator = torch.Generator().manual_seed(0)
    inputs = [Var(spec) for spec in in_specs]
    arguments = [spec.random(generator) for spec in in_specs]
    for t, v in zip(arguments, inputs, strict=True):
        recording.define(t, v)
    if witness is not None:
        witness.begin(arguments)
        recording.constants.witness = witness
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        subclasses_ignored(),
        Recorder(recording),
        NOTHING if witness is None else witness,
    ):
        results = list(fn(*arguments))
    recording.finish()
    outputs: list[Var | None] = []
    specs: list[TensorSpec] = []
    for got, spec in zip(results, out_specs, strict=True):
        if spec is None:
            continue
        specs.append(spec)
        var = None if got is None else recording.variable(got)
        if got is not None and var is None and not recording.vanishes(got):
            raise OpaqueError("returns something that does not descend from its argument")
        outputs.append(var)
    program = Program(inputs, emitter.equations, outputs, specs, source, emitter.fixed)
    return program.live(), results
