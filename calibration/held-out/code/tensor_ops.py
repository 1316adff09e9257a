"""A reverse-mode automatic differentiation engine on numpy arrays, with layers, an optimiser and gradient checks."""

import contextlib
from typing import Callable, Iterator, Sequence

import numpy as np

_recording = True


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    global _recording
    before, _recording = _recording, False
    try:
        yield
    finally:
        _recording = before


def unbroadcast(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums a gradient over the axes along which its operand was broadcast."""
    while gradient.ndim > len(shape):
        gradient = gradient.sum(axis=0)
    for axis, extent in enumerate(shape):
        if extent == 1 and gradient.shape[axis] != 1:
            gradient = gradient.sum(axis=axis, keepdims=True)
    return gradient


class Tensor:
    __slots__ = ("data", "grad", "requires_grad", "_backward", "_parents")

    def __init__(self, data, requires_grad: bool = False, parents: Sequence["Tensor"] = ()) -> None:
        self.data = np.asarray(data, dtype=np.float64)
        self.grad: np.ndarray | None = None
        self.requires_grad = requires_grad or (_recording and any(p.requires_grad for p in parents))
        self._parents = tuple(parents) if self.requires_grad else ()
        self._backward: Callable[[np.ndarray], Sequence[np.ndarray | None]] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def __repr__(self) -> str:
        return f"Tensor({np.array2string(self.data, precision=4)}, requires_grad={self.requires_grad})"

    @staticmethod
    def lift(value) -> "Tensor":
        return value if isinstance(value, Tensor) else Tensor(value)

    def _make(self, data: np.ndarray, parents: Sequence["Tensor"], backward) -> "Tensor":
        out = Tensor(data, parents=parents)
        if out.requires_grad:
            out._backward = backward
        return out

    def __add__(self, other) -> "Tensor":
        other = Tensor.lift(other)
        return self._make(
            self.data + other.data, (self, other), lambda g: (unbroadcast(g, self.shape), unbroadcast(g, other.shape))
        )

    def __mul__(self, other) -> "Tensor":
        other = Tensor.lift(other)
        return self._make(
            self.data * other.data,
            (self, other),
            lambda g: (unbroadcast(g * other.data, self.shape), unbroadcast(g * self.data, other.shape)),
        )

    def __matmul__(self, other: "Tensor") -> "Tensor":
        return self._make(
            self.data @ other.data,
            (self, other),
            lambda g: (g @ np.swapaxes(other.data, -1, -2), np.swapaxes(self.data, -1, -2) @ g),
        )

    def __pow__(self, power: float) -> "Tensor":
        return self._make(self.data**power, (self,), lambda g: (g * power * self.data ** (power - 1),))

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> "Tensor":
        return self * -1.0

    def __sub__(self, other) -> "Tensor":
        return self + (-Tensor.lift(other))

    def __truediv__(self, other) -> "Tensor":
        return self * Tensor.lift(other) ** -1.0

    def sum(self, axis: int | None = None, keepdims: bool = False) -> "Tensor":
        def backward(g: np.ndarray):
            if axis is not None and not keepdims:
                g = np.expand_dims(g, axis)
            return (np.broadcast_to(g, self.shape),)

        return self._make(self.data.sum(axis=axis, keepdims=keepdims), (self,), backward)

    def mean(self, axis: int | None = None) -> "Tensor":
        count = self.data.size if axis is None else self.shape[axis]
        return self.sum(axis) * (1.0 / count)

    def tanh(self) -> "Tensor":
        value = np.tanh(self.data)
        return self._make(value, (self,), lambda g: (g * (1 - value**2),))

    def relu(self) -> "Tensor":
        return self._make(np.maximum(self.data, 0), (self,), lambda g: (g * (self.data > 0),))

    def log_softmax(self) -> "Tensor":
        shifted = self.data - self.data.max(axis=-1, keepdims=True)
        value = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        return self._make(value, (self,), lambda g: (g - np.exp(value) * g.sum(axis=-1, keepdims=True),))

    def pick(self, rows: np.ndarray, columns: np.ndarray) -> "Tensor":
        def backward(g: np.ndarray):
            full = np.zeros_like(self.data)
            np.add.at(full, (rows, columns), g)
            return (full,)

        return self._make(self.data[rows, columns], (self,), backward)

    def backward(self) -> None:
        order: list[Tensor] = []
        seen: set[int] = set()
        stack = [(self, False)]
        while stack:
            node, expanded = stack.pop()
            if expanded:
                order.append(node)
            elif id(node) not in seen:
                seen.add(id(node))
                stack.append((node, True))
                stack.extend((parent, False) for parent in node._parents)
        gradients = {id(self): np.ones_like(self.data)}
        for node in reversed(order):
            gradient = gradients.pop(id(node), None)
            if gradient is None or not node.requires_grad:
                continue
            if node._backward is None:
                node.grad = gradient if node.grad is None else node.grad + gradient
                continue
            for parent, part in zip(node._parents, node._backward(gradient)):
                if part is not None and parent.requires_grad:
                    gradients[id(parent)] = gradients.get(id(parent), 0) + part


class Linear:
    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator) -> None:
        self.weight = Tensor(rng.normal(0, inputs**-0.5, (inputs, outputs)), requires_grad=True)
        self.bias = Tensor(np.zeros(outputs), requires_grad=True)

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias

    def parameters(self) -> list[Tensor]:
        return [self.weight, self.bias]


class Adam:
    def __init__(self, parameters: Sequence[Tensor], rate: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.parameters, self.rate, self.betas, self.step_number = list(parameters), rate, betas, 0
        self.first = [np.zeros_like(p.data) for p in self.parameters]
        self.second = [np.zeros_like(p.data) for p in self.parameters]

    def step(self) -> None:
        self.step_number += 1
        b1, b2 = self.betas
        for p, m, v in zip(self.parameters, self.first, self.second):
            if p.grad is None:
                continue
            m += (1 - b1) * (p.grad - m)
            v += (1 - b2) * (p.grad**2 - v)
            corrected = m / (1 - b1**self.step_number)
            p.data -= self.rate * corrected / (np.sqrt(v / (1 - b2**self.step_number)) + 1e-8)
            p.grad = None


def check_gradient(function: Callable[[Tensor], Tensor], x: np.ndarray, eps: float = 1e-6) -> float:
    """Largest difference between the analytic and the numerical gradient."""
    tensor = Tensor(x, requires_grad=True)
    function(tensor).backward()
    numerical = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * eps
            with no_grad():
                numerical[index] += sign * float(function(Tensor(moved)).data) / (2 * eps)
    return float(np.abs(numerical - tensor.grad).max())


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    print("gradient error", check_gradient(lambda t: (t @ Tensor(np.ones((3, 2)))).tanh().sum(), rng.normal(size=(4, 3))))
    points = rng.uniform(-1, 1, (256, 2))
    labels = (points[:, 0] * points[:, 1] > 0).astype(int)
    layers = [Linear(2, 32, rng), Linear(32, 2, rng)]
    optimiser = Adam([p for layer in layers for p in layer.parameters()], rate=0.02)
    for epoch in range(200):
        scores = layers[1](layers[0](Tensor(points)).tanh()).log_softmax()
        loss = -scores.pick(np.arange(len(labels)), labels).mean()
        loss.backward()
        optimiser.step()
    accuracy = (scores.data.argmax(-1) == labels).mean()
    print(f"loss {float(loss.data):.3f}, accuracy {accuracy:.2%}")
