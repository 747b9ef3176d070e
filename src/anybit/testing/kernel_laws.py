"""Laws about products: 6, 7 and 9. Every kernel the registry finds is held to them with every golden's weights."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

import torch

from anybit.kernels import Kernel, available, get
from anybit.kernels.reference import multiply
from anybit.modules import Part, QuantEmbedding, QuantExperts, QuantLinear
from anybit.testing.goldens import Golden, Unit, samples
from anybit.testing.stored_laws import assert_same_tensors, difference
from anybit.weight.weight import Weight, same

if TYPE_CHECKING:
    from torch import Tensor

# Largest difference from the reference, relative to the largest output. float32: order of summation. bfloat16, float16:
# two roundings of the output (2**-8 and 2**-11 each), doubled for inputs that a kernel rounds once more.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
BATCHES = (1, 7, 64)


class KernelLaws:
    """Weight -> product."""

    # --- 6 ---

    def test_law_6_the_reference_is_the_dense_product(self, golden: Golden) -> None:
        for unit in samples(golden):
            weight = _matrix(unit)
            plain = Weight(weight.tree, weight.dtype)
            dense, x = weight.to_dense(torch.float32).double(), _input(7, weight.shape[1], torch.float32)
            wanted = x.double() @ dense.T
            ours = multiply(plain, x, None)
            assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max(), str(unit)

    def test_law_6_kernels_agree_with_the_reference(self, golden: Golden) -> None:
        for unit, kernel in _accepted(golden):
            weight = _matrix(unit)
            spec, tensors = kernel.prepare(weight)
            for batch, dtype, biased in itertools.product(BATCHES, TOLERANCE, (False, True)):
                x = _input(batch, weight.shape[1], dtype)
                bias = torch.linspace(-1, 1, weight.shape[0]).to(dtype) if biased else None
                _assert_close(
                    kernel.linear(x, spec, tensors, bias),
                    multiply(weight, x, bias),
                    f"{unit}, {kernel.name}, batch {batch}, {dtype}, bias {biased}",
                )

    def test_law_6_kernels_take_inputs_with_gaps(self, golden: Golden) -> None:
        for unit, kernel in _accepted(golden):
            weight = _matrix(unit)
            spec, tensors = kernel.prepare(weight)
            wide = _input(7, 2 * weight.shape[1], torch.float32)
            for x in (wide[:, ::2], wide[:, : weight.shape[1]], _input(weight.shape[1], 7, torch.float32).T):
                before = x.clone()
                ours = kernel.linear(x, spec, tensors, None)
                _assert_close(
                    ours, multiply(weight, x.contiguous(), None), f"{unit}, {kernel.name}, strides {x.stride()}"
                )
                assert torch.equal(x, before), f"{kernel.name} wrote into its input"

    def test_law_6_kernels_agree_on_stacks_and_gradients(self, golden: Golden) -> None:
        reference = get("reference")
        for unit, kernel in _accepted(golden):
            weight = _matrix(unit)
            spec, tensors = kernel.prepare(weight)
            plain_spec, plain = reference.prepare(weight)
            gradient = _input(7, weight.shape[0], torch.float32)
            ours, wanted = (
                kernel.input_gradient(gradient, spec, tensors),
                reference.input_gradient(gradient, plain_spec, plain),
            )
            _assert_close(ours, wanted, f"{unit}, {kernel.name}, gradient")
            index = torch.tensor([0, weight.shape[0] - 1, 1])
            assert torch.equal(kernel.take_rows(index, spec, tensors), reference.take_rows(index, plain_spec, plain)), (
                str(unit)
            )
            whole = unit.layout.decode(unit.tensors)
            if len(whole.shape) == 3 and kernel.refuses(whole, torch.device("cpu")) is None:
                ends = torch.arange(1, whole.shape[0] + 1) * 2
                x = _input(int(ends[-1]), whole.shape[2], torch.float32)
                _assert_close(
                    kernel.experts(x, ends, *kernel.prepare(whole)),
                    reference.experts(x, ends, *reference.prepare(whole)),
                    f"{unit}, {kernel.name}, experts",
                )

    # --- 7 ---

    def test_law_7_restore_gives_back_the_weight(self, golden: Golden) -> None:
        for unit in samples(golden):
            whole = unit.layout.decode(unit.tensors)
            for weight in {id(whole): whole, id(matrix := _matrix(unit)): matrix}.values():
                for kernel, why_not in available():
                    if why_not is None and kernel.refuses(weight, torch.device("cpu")) is None:
                        before = weight.map(torch.clone)
                        again = kernel.restore(*kernel.prepare(weight))
                        assert same(again, weight), f"{unit}, {kernel.name}: {difference(again, weight)}"
                        assert same(weight, before), f"{unit}: {kernel.name} wrote into the weight"

    # --- 9 ---

    def test_law_9_layers_copy_and_give_their_state(self, golden: Golden) -> None:
        for unit in samples(golden):
            layer, inputs = _layer(unit)
            wanted = layer(*inputs)
            assert torch.equal(copy.deepcopy(layer)(*inputs), wanted), str(unit)
            state = {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
            assert_same_tensors(state, unit.tensors, f"{unit}: state_dict")
            other, _ = _layer(unit)
            other.load_state_dict(layer.state_dict())
            assert torch.equal(other(*inputs), wanted), f"{unit}: load_state_dict"

    def test_law_9_layers_compile_without_graph_breaks(self, golden: Golden) -> None:
        for unit in samples(golden):
            layer, inputs = _layer(unit)
            torch._dynamo.reset()
            compiled = torch.compile(layer.__call__, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(*inputs), layer(*inputs)), str(unit)

    def test_law_9_gradients_reach_the_input(self, golden: Golden) -> None:
        for unit in samples(golden):
            layer, inputs = _layer(unit)
            if isinstance(layer, QuantEmbedding):
                continue  # its input are ids
            x = inputs[0].clone().requires_grad_()
            layer(x, *inputs[1:]).sum().backward()
            dense = unit.layout.decode(unit.tensors).to_dense(torch.float32)
            if isinstance(layer, QuantLinear):
                wanted = dense.sum(0).expand_as(x)
            else:
                wanted = torch.stack([dense[_expert_of(row, inputs[1])].sum(0) for row in range(x.shape[0])])
            assert x.grad is not None
            _assert_close(x.grad, wanted, f"{unit}: gradient")


# --- helpers ---------------------------------------------------------------------------------------------------------------


def _matrix(unit: Unit) -> Weight:
    """The unit's weight, or the last expert of a stack."""
    weight = unit.layout.decode(unit.tensors)
    weight = weight.select(weight.shape[0] - 1) if len(weight.shape) == 3 else weight
    return Weight(weight.tree, weight.dtype, weight.activation)


def _accepted(golden: Golden) -> list[tuple[Unit, Kernel]]:
    """Every unit with every kernel of this machine that accepts it; the reference accepts everything."""
    pairs = []
    for unit in samples(golden):
        weight = _matrix(unit)
        for kernel, why_not in available():
            if why_not is None and kernel.refuses(weight, torch.device("cpu")) is None:
                pairs.append((unit, kernel))
    assert {kernel.name for _, kernel in pairs} >= {"reference"}
    return pairs


def _input(batch: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(batch * 1000 + width)).to(dtype)


def _assert_close(ours: Tensor, wanted: Tensor, what: str) -> None:
    assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype), f"{what}: {ours.dtype} {tuple(ours.shape)}"
    error = (ours.float() - wanted.float()).abs().max().item()
    limit = TOLERANCE[wanted.dtype] * max(wanted.float().abs().max().item(), 1e-30)
    assert error <= limit, f"{what}: differs by {error:.3g}, allowed {limit:.3g}"


def _layer(unit: Unit) -> tuple[Any, tuple[Any, ...]]:
    """A packed layer holding the unit, and inputs for it."""
    weight = unit.layout.decode(unit.tensors)
    *_, rows, columns = weight.shape
    parts = (Part(unit.layout),)
    if len(weight.shape) == 3:
        layer: Any = _Grouped()
        layer.stack.set_weights(parts, [weight])
        ends = torch.arange(1, weight.shape[0] + 1) * 2
        return layer, (_input(int(ends[-1]), columns, torch.float32), ends)
    if unit.kind == "embedding":
        layer = QuantEmbedding(rows, columns)
        layer.set_weights(parts, [weight])
        return layer, (torch.tensor([[0, rows - 1, 1], [1, 1, 0]]),)
    layer = QuantLinear(columns, rows, torch.nn.Parameter(torch.linspace(-1, 1, rows)))
    layer.set_weights(parts, [weight])
    return layer, (_input(3, columns, torch.float32),)


class _Grouped(torch.nn.Module):
    """Gives an experts stack a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = QuantExperts()

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return self.stack.grouped(x, ends)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.stack.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return self.stack.load_state_dict(state_dict, *args, **kwargs)


def _expert_of(row: int, ends: Tensor) -> int:
    return int(torch.searchsorted(ends, torch.tensor(row), right=True))
