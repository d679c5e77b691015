"""How far a quantized model's latents and pictures are from the float model's, same noise."""

import jax
import numpy as np

import qjax
from qjax.core import metrics
from qjax.zoo import judge


class Judge:
    """The float model's latents and pictures, and how far others are from them.

    Args:
      pipe: A shipped model.
      images: Pictures, labels in turn.
      steps: Steps of the sampler.
      guidance_scale: Weight of the guidance.
      seed: Of the noise.
      eta: Share of fresh noise a step.
      to_real: Whether the distance to the real test set is told, too.
    """

    def __init__(
        self,
        pipe: qjax.Pipeline,
        images: int,
        steps: int,
        *,
        guidance_scale: float,
        seed: int,
        eta: float = 0.0,
        to_real: bool = False,
    ):
        classes = pipe.num_labels - (pipe.null_label == pipe.num_labels - 1)
        self.pipe, self.steps = pipe, steps
        self.settings = {
            "labels": [i % classes for i in range(images)],
            "steps": steps,
            "eta": eta,
            "guidance_scale": guidance_scale,
            "key": jax.random.key(seed),
            "batch_size": 64,
            "output": "latent",
        }
        self.latents = self.draw(pipe)
        self.images = np.asarray(pipe.images(self.latents))
        self.references = {"fd_to_float": judge.judge(self.images).features}
        if to_real:
            self.references["fd_to_real"] = judge.real_statistics()

    def draw(self, pipe: qjax.Pipeline) -> np.ndarray:
        """The final latents of a pipeline on the noise of the evaluation."""
        return np.asarray(pipe(**self.settings))

    def __call__(self, latents: np.ndarray) -> dict[str, float]:
        """Distances of latents and of their pictures."""
        images = np.asarray(self.pipe.images(latents))
        features = judge.judge(images).features
        return {
            "latent_error": float(metrics.relative_l2(latents, self.latents)),
            **{
                name: float(metrics.frechet_distance(features, reference).value)
                for name, reference in self.references.items()
            },
            "ssim": float(np.mean(metrics.ssim(images, self.images, data_range=1.0))),
        }
