"""The fit of a DiT block as a plain PyTorch loop: what speed is compared with, and no more.

The mathematics is that of `qjax.calibrate.rounding`, `reconstruction` and `optimize` for the
profile `adaround` without quantized inputs, written the way that published code writes it: the
weights rounded anew in every iteration, autograd through block and penalty, `torch.optim.Adam`.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.calibrate.reconstruction import FitSettings, Fitted, Problem, Runner
from qjax.calibrate.rounding import EXPONENTS, GAMMA, ZETA


@dataclasses.dataclass(frozen=True, eq=False)
class TorchFit:
    """A DiT block and the numbers `v` of its layers, as torch tensors.

    Attributes:
      heads: Of its attention.
      layers: By path, of a quantized layer `w`, `scale`, `qmin` and `qmax`.
      v: What is fitted, by path.
      biases: Of the quantized layers, by path.
      modulation: Kernel and bias of the layer that stays in float.
      inputs: Tokens `[m, t, d]` and conditioning `[m, d]`.
      target: `[m, t, d]`.
      baseline: `E_0`.
      settings: Of the fit.
      optimizer: Adam over `v`.
    """

    heads: int
    layers: Mapping[str, tuple[Any, Any, int, int]]
    v: Mapping[str, Any]
    biases: Mapping[str, Any]
    modulation: tuple[Any, Any]
    inputs: tuple[Any, Any]
    target: Any
    baseline: float
    settings: FitSettings
    optimizer: Any

    @classmethod
    def of(
        cls,
        runner: Runner,
        problem: Problem,
        begin: Fitted,
        settings: FitSettings,
        *,
        fused: bool = False,
    ) -> "TorchFit":
        """The same problem from the same start; `fused`: Adam in one kernel."""
        import torch

        tensor = lambda array: torch.from_numpy(np.array(array))
        layers, biases, v = {}, {}, {}
        for path, fmt in runner.formats:
            fixed = problem.fixed[path]
            outer, name = path.split("/")
            layers[path] = (tensor(fixed["w"]), tensor(fixed["scale"]), *fmt.ends)
            biases[path] = tensor(problem.params[outer][name]["bias"])
            v[path] = tensor(begin.weights[path]["v"]).requires_grad_()
        float_layer = problem.params["modulation"]
        args, _ = problem.args
        return cls(
            heads=runner.module.config.num_heads,
            layers=layers,
            v=v,
            biases=biases,
            modulation=(tensor(float_layer["kernel"]), tensor(float_layer["bias"])),
            inputs=(tensor(args[0]), tensor(args[1])),
            target=tensor(problem.target),
            baseline=float(problem.baseline),
            settings=settings,
            optimizer=torch.optim.Adam(list(v.values()), lr=settings.rate, fused=fused),
        )

    def run(self, batches: Sequence[Any], first: int = 0) -> Iterator[float]:
        """Iterations from number `first` on these items; the error `E / E_0` of each."""
        import torch

        settings, (start, end) = self.settings, EXPONENTS
        for number, index in enumerate(batches, first):
            cosine = 0.5 * (1 + math.cos(math.pi * number / settings.iterations))
            for group in self.optimizer.param_groups:
                group["lr"] = settings.rate * (0.1 + 0.9 * cosine)
            self.optimizer.zero_grad(set_to_none=True)
            index = torch.as_tensor(np.array(index), dtype=torch.int64)
            h, conditioning = (array[index] for array in self.inputs)
            out = self._block(h, conditioning)
            error = ((out - self.target[index]) ** 2).sum(-1).mean()
            relative = error / self.baseline
            loss = relative if settings.scaling == "relative" else error
            warm = settings.warmup * settings.iterations
            if number >= warm:
                beta = start + (end - start) * (number - warm) / (settings.iterations - warm)
                penalty = sum(
                    (1 - (2 * _rectified_sigmoid(v) - 1).abs().pow(beta)).sum()
                    for v in self.v.values()
                )
                strength = settings.strength
                if settings.scaling == "relative":
                    strength /= sum(v.numel() for v in self.v.values())
                loss = loss + strength * penalty
            loss.backward()
            self.optimizer.step()
            yield relative.item()

    def _linear(self, path: str, x: Any) -> Any:
        w, scale, qmin, qmax = self.layers[path]
        codes = (w / scale).floor() + _rectified_sigmoid(self.v[path])
        return x @ (codes.clamp(qmin, qmax) * scale) + self.biases[path]

    def _block(self, h: Any, conditioning: Any) -> Any:
        from torch.nn import functional as F

        b, t, d = h.shape
        kernel, bias = self.modulation
        vectors = F.silu(conditioning) @ kernel + bias
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vectors[:, None].chunk(6, dim=-1)
        x = F.layer_norm(h, (d,), eps=1e-6) * (1 + scale_1) + shift_1
        qkv = self._linear("attn/qkv", x).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
        h = h + gate_1 * self._linear("attn/proj", mixed)
        x = F.layer_norm(h, (d,), eps=1e-6) * (1 + scale_2) + shift_2
        wide = F.gelu(self._linear("mlp/fc1", x), approximate="tanh")
        return h + gate_2 * self._linear("mlp/fc2", wide)


def _rectified_sigmoid(v: Any) -> Any:
    return (v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
